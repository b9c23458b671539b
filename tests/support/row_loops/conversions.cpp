// The floats of standard input as bf16, as fp16, and these two as floats again: four arrays on standard
// output.
#include <cstdio>
#include <vector>

#include "cpu/convert.h"

using namespace kd;
using namespace kd::KD_ISA;

template <DType kDType>
void convert(const std::vector<float>& in, std::vector<char>& to, std::vector<float>& back) {
  for (size_t i = 0; i < in.size(); i += kLanes) {
    write<kDType>(to.data() + 2 * i, load(in.data() + i));
    store(back.data() + i, read<kDType>(to.data() + 2 * i));
  }
}

int main() {
  std::vector<float> in;
  float block[4096];  // whole vectors, of any instruction set
  while (std::fread(block, sizeof block, 1, stdin) == 1) in.insert(in.end(), block, block + 4096);
  std::vector<char> to(2 * in.size());
  std::vector<float> back(in.size());
  for (const DType dtype : {kBFloat16, kHalf}) {
    if (dtype == kBFloat16)
      convert<kBFloat16>(in, to, back);
    else
      convert<kHalf>(in, to, back);
    std::fwrite(to.data(), 1, to.size(), stdout);
    std::fwrite(back.data(), sizeof(float), back.size(), stdout);
  }
}
