#include "packed_rows.h"

namespace openelm {

template void packed_few_rows<4>(const Matrix&, const float*, int64_t, float*, int64_t, bool, Scratch&);
template void packed_few_rows<5>(const Matrix&, const float*, int64_t, float*, int64_t, bool, Scratch&);

}  // namespace openelm
