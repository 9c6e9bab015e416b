// Shares work among the threads of torch's own OpenMP runtime.

#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>

// Functions of the OpenMP runtime that torch has loaded (GNU's, or one with the same entry points),
// whose threads the process has bound to cores. Declared here, so that any compiler works.
extern "C" {
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
void GOMP_barrier();
int omp_get_thread_num();
}

namespace {

// Threads of a parallel region. `count` is all threads of torch: a smaller team would end the
// others and lose their binding to cores. At most `workers` of them work.
struct Threads {
  int count, workers;
};

template <class Body>
void parallel(const Threads& threads, Body&& body) {
  if (threads.count == 1) return body();
  GOMP_parallel([](void* data) { (*static_cast<std::remove_reference_t<Body>*>(data))(); }, &body,
                threads.count, 0);
}

// Inside `parallel`: free threads take items 0..count one by one; then all threads wait.
template <class Body>
void share(std::atomic<int64_t>& next, int64_t count, const Threads& threads, const Body& body) {
  if (threads.count == 1 || omp_get_thread_num() < threads.workers)
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(item);
  if (threads.count > 1) GOMP_barrier();
}

}  // namespace
