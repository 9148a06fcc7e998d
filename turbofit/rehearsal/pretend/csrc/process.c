/* How a process begins on a pretend machine, and what a child of fork does with what it inherited:
 * nothing of it counts there, and it has a slot and a timeline of its own from its first call. */
#define _GNU_SOURCE
#include "machine.h"
#include "shared.h"
#include "state.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* Taken in this order. fork waits for all three, so that no child inherits half a start: the
 * reserved addresses fill more than half of a process, and a second start would not get them. */
static pthread_mutex_t starting = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t reading = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static _Atomic int known, begun, forked;

/* ------------------------------------------------------------------- words */

/* "N command": the words of this process, as /proc has them. */
static void write_command(void)
{
    char words[900];
    int file = open("/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
    ssize_t n = file < 0 ? 0 : read(file, words, sizeof words - 1);
    if (file >= 0)
        close(file);
    while (n > 0 && !words[n - 1])
        --n;
    for (ssize_t i = 0; i < n; ++i)
        if ((unsigned char)words[i] < ' ')
            words[i] = ' ';
    words[n > 0 ? n : 0] = 0;
    timeline_line("N %s", words);
}

static void write_head(void)
{
    char map[PRETEND_MAX_DEVICES * 4 + 2] = "-";
    size_t size = 0;
    for (int i = 0, p; (p = physical_of(i)) >= 0; ++i)
        size += (size_t)snprintf(map + size, sizeof map - size, size ? ",%d" : "%d", p);
    timeline_line("I %d %d %s", (int)getpid(), (int)getppid(), map);
    write_command();
}

/* ---------------------------------------------------------------- fork */

static void before_fork(void)
{
    thread_busy();
    pthread_mutex_lock(&starting);
    pthread_mutex_lock(&reading);
    pthread_mutex_lock(&lock);
}

static void in_parent(void)
{
    pthread_mutex_unlock(&lock);
    pthread_mutex_unlock(&reading);
    pthread_mutex_unlock(&starting);
    thread_idle();
}

static void in_child(void)
{
    pthread_mutex_init(&lock, NULL);
    pthread_mutex_init(&reading, NULL);
    pthread_mutex_init(&starting, NULL);
    threads_leave();
    if (!begun)
        return; /* it inherited nothing, and starts by itself */
    timeline_leave();
    forked = 1;
}

__attribute__((constructor)) static void watch_forks(void)
{
    pthread_atfork(before_fork, in_parent, in_child);
}

static void join_after_fork(void)
{
    forked = 0;
    shared_join();
    blocks_leave();
    pools_leave();
    vmm_leave();
    visible_read();
    timeline_open(machine.timeline, machine.timeline_limit);
    write_head();
}

/* ------------------------------------------------------------- beginning */

void machine_start(void)
{
    if (known)
        return;
    pthread_mutex_lock(&reading);
    if (!known) {
        scenario_read();
        shared_open();
        known = 1;
    }
    pthread_mutex_unlock(&reading);
}

static void start_account(void)
{
    machine_start();
    shared_join();
    visible_read();
    addresses_start();
    pools_start();
    timeline_open(machine.timeline, machine.timeline_limit);
    pthread_mutex_lock(&lock); /* the head comes before any event of another thread */
    begun = 1;
    write_head();
    pthread_mutex_unlock(&lock);
}

void account_start(void)
{
    if (begun && !forked)
        return;
    if (!begun) {
        pthread_mutex_lock(&starting);
        if (!begun)
            start_account();
        pthread_mutex_unlock(&starting);
    }
    if (!forked)
        return;
    pthread_mutex_lock(&lock);
    if (forked)
        join_after_fork();
    pthread_mutex_unlock(&lock);
}

void enter(void)
{
    account_start();
    thread_busy();
    pthread_mutex_lock(&lock);
}

void leave(void)
{
    pthread_mutex_unlock(&lock);
    thread_idle();
}

int pretend_abi(void) { return PRETEND_ABI; }

/* ------------------------------------------------------------ the machine */

int machine_count(void)
{
    machine_start();
    return machine.count;
}

const struct pretend_device *machine_device(int physical)
{
    return physical >= 0 && physical < machine_count() ? &machine.devices[physical] : NULL;
}

int machine_reaches(int from, int to)
{
    return machine_device(from) && machine_device(to) && machine.peers[from][to];
}

int machine_processes(int physical, struct machine_process *out, int room)
{
    int found = 0;
    if (!machine_device(physical))
        return 0;
    const struct shared *all = shared_all();
    for (uint32_t i = 0; i < all->used; ++i) {
        const struct slot *s = &all->slots[i];
        size_t bytes = s->held[physical] + s->context[physical] + s->late[physical];
        if (!bytes || !slot_alive(s))
            continue;
        if (found < room)
            out[found] = (struct machine_process){s->pid, bytes};
        ++found;
    }
    return found;
}
