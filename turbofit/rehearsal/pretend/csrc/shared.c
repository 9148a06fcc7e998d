/* The account of all processes of a machine; see shared.h. Whoever takes memory does it under one
 * robust lock: a process that is killed inside leaves it to the next, which counts anew. Which
 * processes still live is asked only where memory would be refused, where a machine's peak would
 * rise while others hold the same card, and where a process joins. */
#define _GNU_SOURCE
#include "shared.h"
#include "state.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* glibc before 2.35 does not name it */
#endif

static struct shared *all;
static struct slot *mine;

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* --------------------------------------------------------------- processes */

/* The state of a process and when it began; 0 where there is none. */
static int read_stat(int pid, char *state, long *threads, uint64_t *started)
{
    char path[64], text[1024];
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return 0;
    ssize_t n = read(file, text, sizeof text - 1);
    close(file);
    text[n > 0 ? n : 0] = 0;
    const char *after = strrchr(text, ')');
    unsigned long long ticks;
    if (!after || sscanf(after + 1,
                         " %c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %ld"
                         " %*d %llu", state, threads, &ticks) != 3)
        return 0;
    *started = ticks;
    return 1;
}

int slot_alive(const struct slot *slot)
{
    char state;
    long threads;
    uint64_t started;
    if (slot->state != SLOT_LIVE)
        return 0;
    if (slot == mine)
        return 1;
    errno = 0;
    if (!read_stat(slot->pid, &state, &threads, &started))
        return errno != ENOENT && errno != ESRCH && kill(slot->pid, 0) == 0;
    return started == slot->started && (state != 'X' && (state != 'Z' || threads > 1));
}

/* ------------------------------------------------------------------- sums */

static void count_anew(void)
{
    memset(all->sum, 0, sizeof all->sum);
    for (uint32_t i = 0; i < all->used; ++i)
        for (int row = 0; all->slots[i].state == SLOT_LIVE && row < SHARED_ROWS; ++row)
            all->sum[row] += all->slots[i].held[row] + all->slots[i].context[row] +
                             all->slots[i].late[row];
}

static void sweep(void)
{
    for (uint32_t i = 0; i < all->used; ++i)
        if (all->slots[i].state == SLOT_LIVE && !slot_alive(&all->slots[i]))
            all->slots[i].state = SLOT_GONE;
    count_anew();
}

static void lock(void)
{
    if (pthread_mutex_lock(&all->lock.mutex) == EOWNERDEAD) {
        pthread_mutex_consistent(&all->lock.mutex);
        sweep();
    }
}

static void unlock(void) { pthread_mutex_unlock(&all->lock.mutex); }

static size_t limit_of(int row)
{
    if (row == PINNED_ROW)
        return machine.pinned_limit;
    const struct pretend_device *d = &machine.devices[row];
    return d->total > d->used ? d->total - d->used : 0;
}

static size_t left_of(int row)
{
    size_t limit = limit_of(row);
    return all->sum[row] < limit ? limit - all->sum[row] : 0;
}

static void note_peak(int row)
{
    if (all->sum[row] <= all->peak[row])
        return;
    if (all->sum[row] > mine->held[row] + mine->context[row] + mine->late[row])
        sweep(); /* others have a part in it: do they still live? */
    if (all->sum[row] <= all->peak[row])
        return;
    all->peak[row] = all->sum[row];
    all->peak_at[row] = now();
    for (uint32_t i = 0; i < all->used; ++i) {
        struct slot *s = &all->slots[i];
        s->at_peak[row] = s->state == SLOT_LIVE ? s->held[row] + s->context[row] + s->late[row] : 0;
    }
}

/* Adds bytes to one of our own counts, if they fit. */
static int add(uint64_t *count, int row, size_t bytes, size_t *left)
{
    lock();
    *left = left_of(row);
    if (bytes > *left) {
        sweep();
        *left = left_of(row);
    }
    int status = bytes > *left ? PRETEND_NO_MEMORY : PRETEND_OK;
    if (status) {
        mine->refused_at = now();
    } else {
        *count += bytes;
        all->sum[row] += bytes;
        if (mine->held[row] > mine->peak[row])
            mine->peak[row] = mine->held[row];
        note_peak(row);
    }
    unlock();
    return status;
}

/* ------------------------------------------------------------------ calls */

size_t shared_free(int row)
{
    lock();
    if (all->sum[row] > mine->held[row] + mine->context[row] + mine->late[row])
        sweep();
    size_t left = left_of(row);
    unlock();
    return left;
}

int shared_take(int row, size_t bytes, size_t *left) { return add(&mine->held[row], row, bytes, left); }

uint64_t shared_count(int pinned)
{
    return __atomic_add_fetch(&all->counts[pinned], 1, __ATOMIC_RELAXED);
}

void shared_refuse(void) { mine->refused_at = now(); }

int shared_context(int row, size_t bytes, size_t *left)
{
    return add(&mine->context[row], row, bytes, left);
}

void shared_give(int row, size_t bytes)
{
    lock();
    mine->held[row] -= bytes;
    all->sum[row] -= bytes;
    unlock();
}

void shared_late(int row, size_t bytes)
{
    lock();
    mine->late[row] = bytes;
    all->sum[row] += bytes;
    note_peak(row);
    unlock();
}

const struct slot *shared_mine(void) { return mine; }
const struct shared *shared_all(void) { return all; }

/* --------------------------------------------------------------- beginning */

static void prepare(struct shared *fresh, int shared)
{
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    if (shared) {
        pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
        pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    }
    pthread_mutex_init(&fresh->lock.mutex, &attributes);
    pthread_mutexattr_destroy(&attributes);
    fresh->magic = SHARED_MAGIC;
}

int disk_has_room(void *mapped, size_t size)
{
    return madvise(mapped, size, MADV_POPULATE_WRITE) == 0 || errno != EFAULT;
}

static struct shared *map_file(const char *path)
{
    struct shared *mapped = MAP_FAILED;
    int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (file < 0)
        return NULL;
    flock(file, LOCK_EX); /* the first one prepares it */
    if (ftruncate(file, (off_t)sizeof *mapped) == 0)
        mapped = mmap(NULL, sizeof *mapped, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (mapped != MAP_FAILED && !disk_has_room(mapped, sizeof *mapped))
        mapped = MAP_FAILED; /* it stays mapped, once for a process */
    if (mapped != MAP_FAILED && mapped->magic == 0)
        prepare(mapped, 1);
    flock(file, LOCK_UN); /* close would not: the mapping keeps the file open */
    close(file);
    if (mapped != MAP_FAILED && mapped->magic == SHARED_MAGIC)
        return mapped;
    return NULL;
}

void shared_open(void)
{
    if (*machine.shared && !(all = map_file(machine.shared))) {
        fprintf(stderr, "turbofit pretend: %s cannot be shared: this process counts alone\n",
                machine.shared);
        *machine.shared = 0;
    }
    if (!all) {
        void *own = mmap(NULL, sizeof *all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (own == MAP_FAILED)
            abort();
        all = own;
        prepare(all, 0);
    }
}

static struct slot *empty_slot(void)
{
    if (all->used < SHARED_SLOTS)
        return &all->slots[all->used++];
    struct slot *oldest = NULL;
    for (int i = 0; i < SHARED_SLOTS; ++i)
        if (all->slots[i].state != SLOT_LIVE && (!oldest || all->slots[i].began < oldest->began))
            oldest = &all->slots[i];
    return oldest;
}

void shared_join(void)
{
    char state;
    long threads;
    uint64_t started = 0;
    if (!*machine.shared && mine) { /* a child of fork with a copy of its parent's account */
        memset(all, 0, sizeof *all);
        prepare(all, 0);
    }
    mine = NULL;
    read_stat(getpid(), &state, &threads, &started);
    lock();
    for (uint32_t i = 0; i < all->used; ++i) { /* what this process was before it called exec */
        struct slot *s = &all->slots[i];
        if (s->state == SLOT_LIVE && s->pid == getpid() && s->started == started)
            s->state = SLOT_GONE;
    }
    sweep();
    struct slot *slot = empty_slot();
    if (!slot) {
        unlock();
        fputs("turbofit pretend: too many processes on one pretend machine\n", stderr);
        abort();
    }
    memset(slot, 0, sizeof *slot);
    slot->pid = getpid();
    slot->started = started;
    slot->began = now();
    slot->state = SLOT_LIVE;
    mine = slot;
    unlock();
}
