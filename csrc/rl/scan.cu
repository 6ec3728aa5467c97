#include "common/device_number.cuh"
#include "rl/scan.h"
namespace gradops {
int64_t cuda::scan_workspace(const ScanTask&) { return 0; }
void cuda::scan(const ScanTask&, void*, void*) {}
}  // namespace gradops
