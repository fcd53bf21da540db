// The kernels of probe.cu on the host, from file to file:
//   probe quantize M K x.bin q.bin scale.bin        probe matmul M N K a.bin b.bin c.bin
#include <fstream>
#include <string>

#include "probe.cu"

template <class T>
std::vector<T> read(const char* path, size_t count) {
  std::vector<T> data(count);
  std::ifstream file(path, std::ios::binary);
  file.read(reinterpret_cast<char*>(data.data()), std::streamsize(count * sizeof(T)));
  if (!file) cuda_emu::fail("an input file is too short");
  return data;
}

template <class T>
void write(const char* path, const std::vector<T>& data) {
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(data.data()), std::streamsize(data.size() * sizeof(T)));
}

int main(int argc, char** argv) {
  if (argc != 7 && argc != 8) return 2;
  const int M = std::atoi(argv[2]);
  if (argv[1] == std::string("quantize")) {
    const int K = std::atoi(argv[3]);
    const auto x = read<float>(argv[4], size_t(M) * K);
    std::vector<int8_t> q(x.size());
    std::vector<float> scale(M);
    probe::launch_quantize_rows(x.data(), q.data(), scale.data(), M, K, nullptr);
    write(argv[5], q);
    write(argv[6], scale);
  } else {
    const int N = std::atoi(argv[3]), K = std::atoi(argv[4]);
    const auto a = read<int8_t>(argv[5], size_t(M) * K), b = read<int8_t>(argv[6], size_t(N) * K);
    std::vector<int> c(size_t(M) * N);
    probe::launch_matmul_s8(a.data(), b.data(), c.data(), M, N, K, nullptr);
    write(argv[7], c);
  }
}
