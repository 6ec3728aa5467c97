#include "common/thread_pool.h"
static const bool installed = (gradops::set_parallel_backend({gradops::thread_pool, gradops::thread_count}), true);
