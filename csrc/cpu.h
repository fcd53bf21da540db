// Which instruction set the kernels of this process use. Found once at run time; PYOPS_CPU_ISA lowers it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace pyops {

// In ascending order: a machine that has one has all before it.
enum class Isa : int { generic, avx2, avx512, avx512vnni, amx };

const char* isa_name(Isa isa);

// The best that this machine and its kernel allow.
Isa detected_isa();

// The one in use: detected, or what PYOPS_CPU_ISA or force_isa asked for.
Isa active_isa();

// Whether kernels may use AMX-BF16: every machine with AMX-INT8 so far has it, but it is an extension of its own.
bool amx_multiplies_bf16();

// Use `name` from now on ("" for the detected one). Throws std::invalid_argument for an unknown name or one that this
// machine lacks.
void force_isa(const std::string& name);

// Every ISA that can be forced here, ascending.
std::vector<std::string> available_isas();

// Ask the kernel for 2 MiB pages under a large buffer, before it is filled or afterwards: the page walks of 4 KiB pages
// cost a stream 3 to 8 %.
void advise_huge_pages(const void* data, size_t bytes, bool filled = false);

// Register-only rate of the instruction that `isa` multiplies int8 with, in 10⁹ operations a second, over `threads`
// threads: the ceiling that benchmarks compare with.
double int8_peak_gops(const std::string& isa, int threads);

// Best of several passes over `bytes` of memory, each thread reading its own part, in 10⁹ bytes a second.
double read_bandwidth_gbs(int64_t bytes, int threads);

// The same for a pass that reads `read_streams` arrays and updates `update_streams` others in place, `bytes` all
// together: what an optimizer's step can reach. An updated byte counts twice.
double update_bandwidth_gbs(int64_t bytes, int threads, int read_streams, int update_streams);

}  // namespace pyops
