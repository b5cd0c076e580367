// A small persistent thread pool. Only files for the baseline instruction set include this.
#pragma once

#include <stdint.h>

namespace mixlocal {

// Runs body(context, item) for every item in [0, items), on the calling thread and the pool's; returns when all are done.
// Items are handed out one at a time, so a thread that the system takes away delays at most the item it holds. Calls from
// several threads take turns. What `body` throws is thrown to the caller, when all other items are done.
void run_items(int64_t items, void (*body)(const void* context, int64_t item), const void* context);

template <class Body>
void for_each_item(int64_t items, const Body& body) {
    run_items(items, [](const void* context, int64_t item) { (*static_cast<const Body*>(context))(item); }, &body);
}

int threads();               // the calling thread included
void set_threads(int count); // at least 1; at first, the cores this process may use

}  // namespace mixlocal
