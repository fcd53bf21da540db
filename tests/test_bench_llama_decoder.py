"""The benchmark of a Llama's decoder: every peer runs it and is right."""

from __future__ import annotations

import pytest
import torch

from pyops.bench import llama_decoder, llama_decoder_peers, report


def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("HIDDEN", 256), ("INNER", 512), ("HEADS", 4)):
        monkeypatch.setattr(llama_decoder, name, size)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_all_run_the_llama(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller one, once and again: decoding leaves the cache as it was."""
    pytest.importorskip("transformers")
    _small(monkeypatch)
    cpu = torch.device("cpu")
    cases = [case for case in llama_decoder.OP.cases if case.shared == phase]
    with torch.inference_mode():
        want = llama_decoder.oracle(llama_decoder.make_inputs(cases[0], cpu)).numpy()
        assert want.shape == (1, cases[0].dims["tokens"], 256)
        run = 0
        for kind in llama_decoder_peers.PEERS:
            case = next((case for case in cases if kind.covers(case)), None)  # each of ours covers one
            if case is None or kind.missing("cpu"):
                continue
            run += 1
            (build,) = kind(cpu, 1).variants(llama_decoder.make_inputs(case, cpu)).values()
            instance = build()
            first, again = (instance.output(instance.call()).float().numpy() for _ in range(2))
            assert (first == again).all()
            assert report.sqnr_db(first, want) >= llama_decoder.OP.min_sqnr_db, kind.name
            if kind.role == "ours":
                rounded = llama_decoder.reference(llama_decoder.make_inputs(case, cpu)).numpy()
                assert report.sqnr_db(first, rounded) >= case.reference_min_sqnr_db, kind.name
        assert run >= 6


@pytest.mark.parametrize("ours", ["pyops-int4", "pyops-int8"])
def test_the_reference_leaves_the_model_as_it_was(ours: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    _small(monkeypatch)
    case = next(case for case in llama_decoder.OP.cases if case.ours == ours)
    inputs = llama_decoder.make_inputs(case, torch.device("cpu"))
    want = llama_decoder.oracle(inputs)
    rounded = llama_decoder.reference(inputs)
    assert torch.equal(llama_decoder.oracle(inputs), want)
    assert 30 < report.sqnr_db(rounded.numpy(), want.numpy()) < 80
