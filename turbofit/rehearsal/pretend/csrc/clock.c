/* How long TurboMind's forwards take on a pretend card. Each stream has a time until which it works.
 * A few kernels' launches tell what a forward does, and the clock's file, which ../clock.py writes
 * and reads, how many seconds that takes. Nothing waits at a launch, as on a card: whoever
 * synchronises sleeps. */
#define _GNU_SOURCE
#include "clock.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* The kernels that are read, in the order of a forward: images are encoded, as tiles or as grids of
 * patches; lengths of sequences are summed up, tokens looked up, and a prompt's keys written in each
 * layer, on a stream of their own if there are answers beside. */
enum { TILES, GRIDS, LENGTHS, TOKENS, KEYS, KERNELS, MOST_KERNELS = 512, MOST = 1 << 18 };
static const char *const names[KERNELS] = {"patchIm2ColKernel", "buildMappedIdxBatchedKernel",
    "BatchPrefixSumKernel", "embeddingLookupKernel", "ProcessKV_v2"};

static struct {
    double factor; /* times slower than the table; 0: no time */
    _Atomic int64_t until, busy, late, idle, forwards; /* the first card's, in nanoseconds */
    double pair, context; /* seconds of a pair of tokens in a prompt, of a token in the cache */
    double tokens[MOST], units[MOST]; /* seconds of a forward over N tokens, an image of N units */
} *page;
static struct { const void *function; int kernel; } known[MOST_KERNELS];
static int count;
static __thread struct { const int *lengths; int rows, goes_on; } forward;

__attribute__((constructor)) static void open_page(void)
{
    const char *path = getenv("TURBOFIT_PRETEND_CLOCK");
    int file = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    void *at = mmap(NULL, sizeof *page, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    page = at == MAP_FAILED ? NULL : at;
    close(file);
}

void clock_register(const void *host_function, const char *device_name)
{
    for (int kernel = 0; page && device_name && kernel < KERNELS; ++kernel)
        if (count < MOST_KERNELS && strstr(device_name, names[kernel]))
            known[count++] = (typeof(*known)){host_function, kernel};
}

/* The default streams have none. */
static int has_time(const object_ *object) { return page && (size_t)object > 2; }

static int64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static void work(object_ *stream, double seconds)
{
    int64_t idle = now() - stream->until;
    if (idle > 0)
        stream->until += idle;
    if (idle > 0 && idle < 1000000000 && forward.goes_on && !stream->device)
        page->idle += idle; /* longer: who asked has given up */
    forward.goes_on = 1;
    stream->until += (int64_t)(seconds * page->factor * 1e9);
    page->busy += stream->device ? 0 : (int64_t)(seconds * 1e9);
    page->until = stream->until > page->until ? stream->until : page->until;
}

static double images_of(const int (*frames)[3], int images)
{
    double seconds = 0; /* of an image: frames, and the height and the width of each */
    for (int i = 0; i < images; ++i)
        seconds += frames[i][0] * page->units[frames[i][1] * frames[i][2] % MOST];
    return seconds;
}

/* Of sequences, whose last `prompts` are prompts; `ends` has where the tokens of each end. */
static double attention_of(const int *ends, int prompts)
{
    double pairs = 0, context = 0;
    for (int i = 0, first = forward.rows - prompts; i < forward.rows; ++i) {
        double tokens = i < first ? 0 : ends[i - first + 1] - ends[i - first];
        pairs += tokens * (forward.lengths[i] - tokens / 2);
        context += i < first ? forward.lengths[i] : 0;
    }
    forward.lengths = NULL; /* until the next forward: the next layer's keys do not count */
    return pairs * page->pair + context * page->context;
}

void clock_launch(const void *host_function, void **args, const dim3_ *grid, object_ *stream)
{
    int i = 0, of = grid->x;
    while (i < count && known[i].function != host_function)
        ++i;
    if (i == count || !(page->factor > 0) || !has_time(stream))
        return;
    if (known[i].kernel == LENGTHS)
        forward.lengths = *(const int **)args[0], forward.rows = *(int *)args[1];
    else if (known[i].kernel == TILES)
        work(stream, page->units[of % MOST]);
    else if (known[i].kernel == GRIDS)
        work(stream, images_of(*(const int (**)[3])args[1], of));
    else if (known[i].kernel == KEYS && forward.lengths)
        work(stream, attention_of(*(const int **)args[5], grid->z));
    else if (known[i].kernel == TOKENS && forward.lengths) /* else the tower's own table */
        work(stream, page->tokens[of % MOST]), ++page->forwards;
    if (known[i].kernel == TOKENS && forward.lengths && of == forward.rows)
        work(stream, attention_of(NULL, 0)); /* no prompt, so nobody writes keys */
}

void clock_goes_on(int sequences) { forward.goes_on = sequences; }

void clock_follow(object_ *after, const object_ *before)
{
    if (has_time(after) && has_time(before) && after->until < before->until)
        after->until = before->until;
}

void clock_wait(const object_ *object)
{
    int64_t until = has_time(object) ? object->until : 0;
    const struct timespec at = {until / 1000000000, until % 1000000000};
    if (until <= now())
        return;
    while (now() < until) /* a signal may have woken it */
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, NULL);
    page->late += object->device ? 0 : now() - until;
}
