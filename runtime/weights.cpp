// Shapes of tensors in files, and the tied head of the released model.
#include "runtime/weights.h"

#include <algorithm>
#include <cctype>
#include <set>
#include <string>
#include <vector>

#include "base/safetensors.h"
#include "base/text.h"
#include "model.h"

namespace gca {

Shape tensor_shape(const Tensor& t) { return t.columns ? Shape{t.rows, t.columns} : Shape{t.rows}; }

bool is_tied_head(const SafetensorsFile& file, const SafetensorsTensor& head) {
  const SafetensorsTensor* embedding = file.find("model.embed_tokens.weight");
  if (!embedding || embedding->shape != head.shape) return false;
  std::vector<float> a, b;
  for (int64_t first = 0; first < head.count; first += static_cast<int64_t>(a.size())) {
    a.resize(std::min<int64_t>(head.count - first, 1 << 20));
    b.resize(a.size());
    file.read(head, first, static_cast<int64_t>(a.size()), a.data());
    file.read(*embedding, first, static_cast<int64_t>(b.size()), b.data());
    if (a != b) return false;
  }
  return true;
}

std::string part_remark(const std::string& path) {
  const size_t of = path.rfind("-of-");
  const bool part = of != path.npos && of > 0 && std::isdigit(static_cast<unsigned char>(path[of - 1]));
  return part ? ", or give the index of all parts (.safetensors.index.json) or their folder: this is one part" : "";
}

bool is_padded(const SafetensorsTensor& found, const Tensor& t) {
  return t.offset == 0 && found.shape.size() == 2 && found.shape[1] == t.columns && found.shape[0] > t.rows &&
         found.shape[0] <= round_up(t.rows, 128);
}

}  // namespace gca
