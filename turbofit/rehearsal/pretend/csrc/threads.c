/* Threads that call CUDA: their current device and last error, a count of
 * calls, and a way to hold them all still.
 *
 * Holding them lets a driver queue many requests before the engine looks at
 * the first: each of these threads gets a signal whose handler waits. The
 * engine's idle threads wait on condition variables without their locks, so
 * nothing that pushes requests can meet a lock that is held.
 */
#define _GNU_SOURCE
#include "state.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MAX_THREADS 512
#define LIMIT_MS 5000

static __thread int current_device, has_current;
static __thread int slot = -1;
static __thread volatile sig_atomic_t busy, due;
static _Atomic int thread_ids[MAX_THREADS];
static _Atomic uint64_t calls;
static _Atomic int frozen, closed, expired;
static pthread_key_t key;
static pthread_once_t once = PTHREAD_ONCE_INIT;

int *pretend_current_device(void) { return &current_device; }

int *pretend_has_current(void) { return &has_current; }

static void forget(void *value)
{
    thread_ids[(intptr_t)value - 1] = 0;
}

static void pause_briefly(void)
{
    struct timespec t = {0, 500000};
    int saved = errno;
    nanosleep(&t, NULL);
    errno = saved;
}

static void wait_here(void)
{
    atomic_fetch_add(&frozen, 1);
    for (int i = 0; atomic_load(&closed); ++i) {
        pause_briefly();
        if (i > 2 * LIMIT_MS) { /* it may have met a lock that the driver waits for */
            atomic_store(&expired, 1);
            break;
        }
    }
    atomic_fetch_sub(&frozen, 1);
}

static void told(int number)
{
    (void)number;
    if (busy)
        due = 1;
    else
        wait_here();
}

void thread_busy(void) { busy = 1; }

void thread_idle(void)
{
    busy = 0;
    if (due) {
        due = 0;
        wait_here();
    }
}

/* In a child of fork: its one thread is none of the parent's, and nobody holds it. */
void threads_leave(void)
{
    for (int i = 0; i < MAX_THREADS; ++i)
        atomic_store(&thread_ids[i], 0);
    atomic_store(&closed, 0);
    atomic_store(&frozen, 0);
    slot = -1;
    busy = due = 0;
    current_device = has_current = 0;
}

static int hold_signal(void) { return SIGRTMIN + 11; }

static void start(void)
{
    struct sigaction action = {0};
    action.sa_handler = told;
    action.sa_flags = SA_RESTART;
    sigaction(hold_signal(), &action, NULL);
    pthread_key_create(&key, forget);
}

void pretend_called(void)
{
    atomic_fetch_add_explicit(&calls, 1, memory_order_relaxed);
    if (slot >= 0)
        return;
    pthread_once(&once, start);
    int id = (int)syscall(SYS_gettid);
    for (int i = 0; i < MAX_THREADS; ++i) {
        int empty = 0;
        if (atomic_compare_exchange_strong(&thread_ids[i], &empty, id)) {
            slot = i;
            pthread_setspecific(key, (void *)(intptr_t)(i + 1));
            return;
        }
    }
    slot = MAX_THREADS; /* more threads than we hold: this one is not held */
}

uint64_t pretend_calls(void) { return atomic_load(&calls); }

int pretend_freeze(int timeout_ms)
{
    int wanted = 0, me = (int)syscall(SYS_gettid);
    atomic_store(&expired, 0);
    atomic_store(&closed, 1);
    for (int i = 0; i < MAX_THREADS; ++i) {
        int id = atomic_load(&thread_ids[i]);
        if (id && id != me && syscall(SYS_tgkill, getpid(), id, hold_signal()) == 0)
            ++wanted;
    }
    for (int waited = 0; atomic_load(&frozen) < wanted; ++waited) {
        if (waited / 2 > timeout_ms) {
            pretend_thaw();
            return -1;
        }
        pause_briefly();
    }
    return wanted;
}

int pretend_thaw(void)
{
    atomic_store(&closed, 0);
    while (atomic_load(&frozen))
        pause_briefly();
    return !atomic_load(&expired);
}
