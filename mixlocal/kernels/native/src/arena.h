// Memory that each thread keeps from one operation to the next: fresh pages cost more than the arithmetic on them.
// Only files for the baseline instruction set include this.
#pragma once

#include <stdint.h>

#include <memory>
#include <vector>

namespace mixlocal {

class Arena {
public:
    // What is taken while a Scope lives is given back when it ends.
    class Scope {
    public:
        explicit Scope(Arena& arena) : arena_(arena), used_(arena.used_) {}
        ~Scope() { arena_.release(used_); }
        Scope(const Scope&) = delete;
        Scope& operator=(const Scope&) = delete;

        // `count` numbers of any value, 64-byte aligned. Throws std::bad_alloc.
        template <class T>
        T* take(int64_t count) {
            return static_cast<T*>(arena_.take(count * static_cast<int64_t>(sizeof(T))));
        }

    private:
        Arena& arena_;
        int64_t used_;
    };

    static Arena& of_this_thread();

private:
    struct Free {
        void operator()(char* p) const;
    };
    struct Piece {
        std::unique_ptr<char, Free> memory;
        int64_t first, bytes;  // the offsets it serves
    };

    void* take(int64_t bytes);
    void release(int64_t used);

    std::vector<Piece> pieces_;  // of rising offsets; only the last one is ever added to
    int64_t used_ = 0;
};

}  // namespace mixlocal
