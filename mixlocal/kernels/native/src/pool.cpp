#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#ifdef __linux__
#include <sched.h>
#endif

namespace mixlocal {
namespace {

constexpr auto kSpin = std::chrono::microseconds(30);  // about one wake-up; longer would rob a busy neighbour

void relax() {
#ifdef MIXLOCAL_X86
    __builtin_ia32_pause();
#endif
}

// Spins until `ready()` or for kSpin.
template <class Ready>
bool spin(const Ready& ready) {
    const auto deadline = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int i = 0; i < 32; ++i, relax())
            if (ready()) return true;
    } while (std::chrono::steady_clock::now() < deadline);
    return false;
}

int allowed_cores() {
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    const unsigned count = std::thread::hardware_concurrency();
    return count ? static_cast<int>(count) : 1;
}

class Pool {
public:
    void run(int64_t items, void (*body)(const void*, int64_t), const void* context) {
        const std::lock_guard<std::mutex> turn(turn_);
        const int wanted = static_cast<int>(items < threads() ? items : threads());
        if (wanted <= 1) {
            for (int64_t item = 0; item < items; ++item) body(context, item);
            return;
        }
        start_workers(wanted - 1);
        publish(items, body, context);
        work();
        wait_until_done(items);
        if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
    }

    int threads() const { return threads_.load(std::memory_order_relaxed); }
    void set_threads(int count) { threads_.store(count < 1 ? 1 : count, std::memory_order_relaxed); }

private:
    // A job is its ticket: a number of the job in the high half, items not yet taken in the low half. Taking an item is one
    // compare-and-swap of the ticket, so a worker that slept through its job can never take an item of the next one with the
    // old job's body: the fields below change only after the ticket's low half came to zero and every taken item was done.
    static constexpr uint64_t kItems = 0xffffffff;

    void publish(int64_t items, void (*body)(const void*, int64_t), const void* context) {
        body_.store(body, std::memory_order_relaxed);
        context_.store(context, std::memory_order_relaxed);
        items_.store(items, std::memory_order_relaxed);
        done_.store(0, std::memory_order_relaxed);
        const uint64_t number = (ticket_.load(std::memory_order_relaxed) | kItems) + 1;
        ticket_.store(number + static_cast<uint64_t>(items), std::memory_order_release);
        const std::lock_guard<std::mutex> lock(sleep_);
        wake_.notify_all();
    }

    // Takes items until none is left.
    void work() {
        for (;;) {
            uint64_t ticket = ticket_.load(std::memory_order_acquire);
            const int64_t left = static_cast<int64_t>(ticket & kItems);
            if (left == 0) return;
            const auto body = body_.load(std::memory_order_relaxed);
            const void* const context = context_.load(std::memory_order_relaxed);
            const int64_t items = items_.load(std::memory_order_relaxed);
            if (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel)) continue;
            try {
                body(context, items - left);
            } catch (...) {
                const std::lock_guard<std::mutex> lock(sleep_);
                failure_ = std::current_exception();
            }
            if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == items) {
                const std::lock_guard<std::mutex> lock(sleep_);
                finished_.notify_all();
            }
        }
    }

    void wait_until_done(int64_t items) {
        const auto done = [&] { return done_.load(std::memory_order_acquire) == items; };
        if (spin(done)) return;
        std::unique_lock<std::mutex> lock(sleep_);
        finished_.wait(lock, done);
    }

    void start_workers(int count) {
        for (; workers_ < count; ++workers_) std::thread([this, index = workers_] { worker(index); }).detach();
    }

    void worker(int index) {
        const auto has_work = [&] { return index + 1 < threads() && (ticket_.load(std::memory_order_acquire) & kItems) != 0; };
        for (;;) {
            if (!spin(has_work)) {
                std::unique_lock<std::mutex> lock(sleep_);
                wake_.wait(lock, has_work);
            }
            work();
        }
    }

    std::atomic<int> threads_{allowed_cores()};
    std::atomic<uint64_t> ticket_{0};
    std::atomic<void (*)(const void*, int64_t)> body_{nullptr};
    std::atomic<const void*> context_{nullptr};
    std::atomic<int64_t> items_{0}, done_{0};
    std::mutex turn_, sleep_;
    std::condition_variable wake_, finished_;
    std::exception_ptr failure_;  // guarded by sleep_ while items run
    int workers_ = 0;
};

// Never destroyed: its threads sleep until the process ends, and joining them at interpreter exit could hang.
Pool& pool() {
    static Pool& instance = *new Pool;
    return instance;
}

}  // namespace

void run_items(int64_t items, void (*body)(const void*, int64_t), const void* context) { pool().run(items, body, context); }
int threads() { return pool().threads(); }
void set_threads(int count) { pool().set_threads(count); }

}  // namespace mixlocal
