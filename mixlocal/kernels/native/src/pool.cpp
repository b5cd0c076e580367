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

// A thread that waits first spins, then offers its core to others at every look, then sleeps. Waking a sleeper costs the
// waker tens of microseconds, as much as the work of one small phase, so workers stay awake from one phase to the next and
// from one token to the next, and a neighbour who wants the core gets it at the next look.
constexpr auto kSpin = std::chrono::microseconds(20);
constexpr auto kYield = std::chrono::milliseconds(2);

void relax() {
#if defined(MIXLOCAL_X86)
    __builtin_ia32_pause();
#elif defined(MIXLOCAL_NEON)
    asm volatile("yield");
#endif
}

// Waits until `ready()`; false after kSpin and kYield.
template <class Ready>
bool wait_awake(const Ready& ready) {
    const auto start = std::chrono::steady_clock::now();
    for (auto waited = start - start; waited < kYield; waited = std::chrono::steady_clock::now() - start) {
        for (int i = 0; i < 32; ++i, relax())
            if (ready()) return true;
        if (waited >= kSpin) std::this_thread::yield();
    }
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
        ticket_.store(number + static_cast<uint64_t>(items), std::memory_order_seq_cst);
        if (sleepers_.load(std::memory_order_seq_cst) == 0) return;
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
            if (done_.fetch_add(1, std::memory_order_seq_cst) + 1 == items && caller_sleeps_.load(std::memory_order_seq_cst)) {
                const std::lock_guard<std::mutex> lock(sleep_);
                finished_.notify_all();
            }
        }
    }

    void wait_until_done(int64_t items) {
        const auto done = [&] { return done_.load(std::memory_order_seq_cst) == items; };
        if (wait_awake(done)) return;
        std::unique_lock<std::mutex> lock(sleep_);
        caller_sleeps_.store(true, std::memory_order_seq_cst);
        finished_.wait(lock, done);
        caller_sleeps_.store(false, std::memory_order_relaxed);
    }

    void start_workers(int count) {
        for (; workers_ < count; ++workers_) std::thread([this, index = workers_] { worker(index); }).detach();
    }

    void worker(int index) {
        const auto has_work = [&] { return index + 1 < threads() && (ticket_.load(std::memory_order_seq_cst) & kItems) != 0; };
        for (;;) {
            if (!wait_awake(has_work)) {
                std::unique_lock<std::mutex> lock(sleep_);
                sleepers_.fetch_add(1, std::memory_order_seq_cst);
                wake_.wait(lock, has_work);
                sleepers_.fetch_sub(1, std::memory_order_relaxed);
            }
            work();
        }
    }

    std::atomic<int> threads_{allowed_cores()};
    std::atomic<uint64_t> ticket_{0};
    std::atomic<void (*)(const void*, int64_t)> body_{nullptr};
    std::atomic<const void*> context_{nullptr};
    std::atomic<int64_t> items_{0}, done_{0};
    std::atomic<int> sleepers_{0};  // workers asleep: who raises it looks for work once more before sleeping
    std::atomic<bool> caller_sleeps_{false};
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
