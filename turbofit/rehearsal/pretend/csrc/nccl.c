/* Stand-in for libnccl.so.2: communicators know their ranks, ncclMemAlloc is on the account,
 * collectives move nothing and wait for nobody. Ranks meet only to split a communicator, and only
 * those of one process can. */
#define _GNU_SOURCE
#include "account.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define API __attribute__((visibility("default")))
#define VERSION 22809 /* 2.28.9: windows are registered */

enum { success = 0, unhandled_cuda = 1, system_error = 2, invalid_argument = 4, invalid_usage = 5 };

#define MAX_RANKS 64
#define SPLIT_SECONDS 30

/* What the ranks of a communicator share: where they meet to split it. */
struct group {
    uint64_t id;
    int ranks, arrived, round;
    struct { int color, key; } wish[MAX_RANKS], settled[MAX_RANKS];
    struct group *next;
};

struct comm {
    int rank, ranks;
    struct group *group;
};

typedef struct { uint64_t number; char rest[120]; } unique_id;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t met = PTHREAD_COND_INITIALIZER;
static struct group *groups;
static uint64_t ids;

/* The group with this number, made by the first rank that asks. Groups are never freed. */
static struct group *group_of(uint64_t id, int ranks)
{
    struct group *g = groups;
    while (g && g->id != id)
        g = g->next;
    if (!g && (g = calloc(1, sizeof *g))) {
        g->id = id;
        g->ranks = ranks;
        g->next = groups;
        groups = g;
    }
    return g;
}

static struct comm *make_comm(int rank, int ranks, uint64_t id)
{
    struct comm *c = ranks <= MAX_RANKS ? malloc(sizeof *c) : NULL;
    struct group *g = c ? group_of(id, ranks) : NULL;
    if (!g) {
        free(c);
        return NULL;
    }
    *c = (struct comm){rank, ranks, g};
    return c;
}

API int ncclGetVersion(int *version)
{
    *version = VERSION;
    return success;
}

API int ncclGetUniqueId(unique_id *id)
{
    memset(id, 0, sizeof *id);
    pthread_mutex_lock(&lock);
    id->number = (uint64_t)getpid() << 40 | ++ids << 24; /* below: the parts of splits */
    pthread_mutex_unlock(&lock);
    return success;
}

API int ncclCommInitRank(struct comm **out, int ranks, unique_id id, int rank)
{
    pretend_called();
    pthread_mutex_lock(&lock);
    *out = make_comm(rank, ranks, id.number);
    pthread_mutex_unlock(&lock);
    return *out ? success : system_error;
}

API int ncclCommInitRankConfig(struct comm **out, int ranks, unique_id id, int rank, void *config)
{
    (void)config;
    return ncclCommInitRank(out, ranks, id, rank);
}

API int ncclCommInitRankScalable(struct comm **out, int ranks, int rank, int count, unique_id *list,
                                 void *config)
{
    (void)config;
    return count > 0 ? ncclCommInitRank(out, ranks, list[0], rank) : invalid_argument;
}

API int ncclCommInitAll(struct comm **out, int ranks, const int *devices)
{
    unique_id id;
    (void)devices;
    ncclGetUniqueId(&id);
    for (int rank = 0; rank < ranks; ++rank)
        if (ncclCommInitRank(&out[rank], ranks, id, rank))
            return system_error;
    return success;
}

API int ncclCommGetAsyncError(const struct comm *c, int *state)
{
    (void)c;
    *state = success;
    return success;
}

API int ncclCommFinalize(struct comm *c)
{
    (void)c;
    return success;
}

API int ncclCommAbort(struct comm *c)
{
    free(c);
    return success;
}

/* All ranks of the parent come here, each from its own thread: those with the same colour form a
 * communicator, ordered by key and then by their old rank. */
API int ncclCommSplit(struct comm *parent, int color, int key, struct comm **out, void *config)
{
    struct group *g = parent->group;
    int rank = 0, ranks = 0;
    (void)config;
    *out = NULL;
    pthread_mutex_lock(&lock);
    int round = g->round;
    g->wish[parent->rank].color = color;
    g->wish[parent->rank].key = key;
    if (++g->arrived == g->ranks) {
        memcpy(g->settled, g->wish, sizeof g->settled);
        g->arrived = 0;
        ++g->round;
        pthread_cond_broadcast(&met);
    }
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += SPLIT_SECONDS;
    while (g->round == round)
        if (pthread_cond_timedwait(&met, &lock, &until) == ETIMEDOUT) {
            --g->arrived;
            pthread_mutex_unlock(&lock);
            return system_error;
        }
    for (int i = 0; i < g->ranks; ++i) {
        if (g->settled[i].color != color)
            continue;
        ++ranks;
        rank += g->settled[i].key < key || (g->settled[i].key == key && i < parent->rank);
    }
    uint64_t id = g->id + (uint64_t)(round + 1) * 256 + (uint64_t)(color + 1);
    if (color >= 0)
        *out = make_comm(rank, ranks, id);
    pthread_mutex_unlock(&lock);
    return color < 0 || *out ? success : system_error;
}

API int ncclCommDestroy(struct comm *c)
{
    free(c);
    return success;
}

API int ncclCommCount(const struct comm *c, int *n)
{
    *n = c->ranks;
    return success;
}

API int ncclCommUserRank(const struct comm *c, int *rank)
{
    *rank = c->rank;
    return success;
}

API int ncclMemAlloc(void **out, size_t size)
{
    uint64_t handle;
    pretend_called();
    *out = NULL;
    size_t step = pretend_vmm_granularity();
    size = size < PRETEND_MOST ? (size + step - 1) / step * step : PRETEND_MOST;
    if (pretend_vmm_create(*pretend_current_device(), size, &handle))
        return unhandled_cuda;
    if (pretend_vmm_reserve(size, out) || pretend_vmm_map(*out, size, handle))
        return system_error;
    pretend_vmm_release(handle); /* the mapping keeps it */
    return success;
}

API int ncclMemFree(void *p)
{
    /* the addresses stay reserved: they cost nothing */
    return pretend_vmm_unmap(p, 0) ? invalid_argument : success;
}

static int nothing(void)
{
    pretend_called();
    return success;
}

API int ncclAllReduce(void) { return nothing(); }
API int ncclAllGather(void) { return nothing(); }
API int ncclBroadcast(void) { return nothing(); }
API int ncclReduce(void) { return nothing(); }
API int ncclReduceScatter(void) { return nothing(); }
API int ncclBcast(void) { return nothing(); }
API int ncclAlltoAll(void) { return nothing(); }
API int ncclGather(void) { return nothing(); }
API int ncclScatter(void) { return nothing(); }
API int ncclSend(void) { return nothing(); }
API int ncclRecv(void) { return nothing(); }
API int ncclRedOpDestroy(void) { return success; }

API int ncclRedOpCreatePreMulSum(int *operation)
{
    *operation = 5;
    return success;
}
API int ncclGroupStart(void) { return success; }
API int ncclGroupEnd(void) { return success; }

API int ncclCommWindowRegister(struct comm *c, void *p, size_t size, void **window, int flags)
{
    (void)c;
    (void)size;
    (void)flags;
    *window = p;
    return success;
}

API int ncclCommWindowDeregister(struct comm *c, void *window)
{
    (void)c;
    (void)window;
    return success;
}

API int ncclCommRegister(struct comm *c, void *p, size_t size, void **handle)
{
    return ncclCommWindowRegister(c, p, size, handle, 0);
}

API int ncclCommDeregister(struct comm *c, void *handle)
{
    return ncclCommWindowDeregister(c, handle);
}

/* What TurboMind imports for device-side communicators (expert parallelism over DeepEP), and what
 * a CUDA build of PyTorch in the same process needs to be there. Refused when called. */
#define REFUSED(name) \
    API int name(void) { return invalid_usage; }
REFUSED(ncclCommQueryProperties)
REFUSED(ncclDevCommCreate)
REFUSED(ncclDevCommDestroy)
REFUSED(ncclGetLsaDevicePointer)
REFUSED(ncclGetLsaMultimemDevicePointer)
REFUSED(ncclGetPeerDevicePointer)
REFUSED(ncclCommMemStats)
REFUSED(ncclCommResume)
REFUSED(ncclCommShrink)
REFUSED(ncclCommSuspend)
REFUSED(ncclGroupSimulateEnd)
REFUSED(ncclPutSignal)
REFUSED(ncclResetDebugInitInternal)
REFUSED(ncclSignal)
REFUSED(ncclWaitSignal)

API struct { int ranks, rank, stride; } ncclTeamLsa(void)
{
    return (__typeof__(ncclTeamLsa())){1, 0, 1};
}

API const char *ncclGetErrorString(int code)
{
    switch (code) {
    case success: return "no error";
    case unhandled_cuda: return "unhandled cuda error (run with NCCL_DEBUG=INFO for details)";
    case system_error: return "unhandled system error (run with NCCL_DEBUG=INFO for details)";
    case invalid_argument: return "invalid argument (run with NCCL_DEBUG=WARN for details)";
    case invalid_usage: return "invalid usage (run with NCCL_DEBUG=WARN for details)";
    default: return "unknown result code";
    }
}

API const char *ncclGetLastError(void *c)
{
    (void)c;
    return "";
}
