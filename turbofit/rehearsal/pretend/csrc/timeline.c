/* The timeline: one line an event, in the order in which the account saw them.
 *
 *   I pid ppid devices                   whose it is; the physical index of each of its ordinals
 *   N command                            its command line
 *   P phase                              a mark
 *   S text                               where the newest refusal came from, as a Python hook saw it
 *   K device size left <trace>           this process's context on a device was made
 *   C device pool <trace>                a pool was created
 *   A device kind pool size held address <trace>   memory was given
 *   F address held                       it came back
 *   R device pool reserved held          a pool's reserved memory changed
 *   G device free total <trace>          the engine asked how much is free
 *   O device kind pool size left growth <trace>  out of memory; growth is what was missing room
 *   E device kind pool size left number <trace>  the scenario failed this allocation: simulated
 *   X from to <trace>                    peer access that the machine lacks
 *
 * A device is the machine's index. The timeline's path is a file; where it ends with "/" it is a
 * folder with PID.timeline for each process (PID-1.timeline and so on after exec).
 *
 * A trace is "@" and offsets into the engine's own library, innermost first;
 * names are looked up afterwards. The file has a fixed length and ends with
 * zero bytes; it is mapped, so it is whole even where the process aborts. If the
 * disk is full, the file is cut after its last line, so that it is read as full.
 */
#define _GNU_SOURCE
#include "shared.h"
#include "state.h"

#include <errno.h>
#include <execinfo.h>
#include <fcntl.h>
#include <link.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define FRAMES 48
#define KEPT 20
#define STEP 4096 /* bytes for which the disk must have room before they are written */

static char *text;        /* the file, mapped: what is written survives an abort */
static char file_path[4200];
static size_t filled;
static size_t roomy;      /* bytes that the disk has room for */
static size_t limit_bytes;
static int full;
static int left;          /* this is a child of fork */
static uintptr_t engine_begin, engine_end, engine_base;

static int find_engine(struct dl_phdr_info *info, size_t size, void *data)
{
    (void)size;
    (void)data;
    const char *pattern = getenv("TURBOFIT_PRETEND_ENGINE");
    if (!info->dlpi_name || !strstr(info->dlpi_name, pattern ? pattern : "_turbomind."))
        return 0;
    engine_base = info->dlpi_addr;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const ElfW(Phdr) *p = &info->dlpi_phdr[i];
        if (p->p_type == PT_LOAD && (p->p_flags & PF_X)) {
            engine_begin = info->dlpi_addr + p->p_vaddr;
            engine_end = engine_begin + p->p_memsz;
            return 1;
        }
    }
    return 0;
}

static int open_in(const char *folder)
{
    for (int i = 0; i < 1000; ++i) {
        if (i)
            snprintf(file_path, sizeof file_path, "%s%d-%d.timeline", folder, (int)getpid(), i);
        else
            snprintf(file_path, sizeof file_path, "%s%d.timeline", folder, (int)getpid());
        int file = open(file_path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
        if (file >= 0 || errno != EEXIST)
            return file;
    }
    return -1;
}

void timeline_open(const char *path, size_t limit)
{
    if (!path || !*path || !limit)
        return;
    int folder = path[strlen(path) - 1] == '/';
    if (!folder && left) /* one file has room for one process */
        return;
    snprintf(file_path, sizeof file_path, "%s", path);
    int file = folder ? open_in(path) : open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (file < 0)
        return;
    if (ftruncate(file, (off_t)limit) == 0) {
        void *mapped = mmap(NULL, limit, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        if (mapped != MAP_FAILED) {
            text = mapped;
            limit_bytes = limit;
        }
    }
    close(file);
}

void timeline_leave(void)
{
    if (text)
        munmap(text, limit_bytes);
    text = NULL;
    filled = roomy = limit_bytes = 0;
    full = 0;
    left = 1;
}

static void end_on_full_disk(void)
{
    full = 1;
    fprintf(stderr, "turbofit pretend: the disk is full: %s ends here\n", file_path);
    if (truncate(file_path, (off_t)filled))
        perror("turbofit pretend");
}

static void put(const char *line, size_t size)
{
    if (!text || full || filled + size >= limit_bytes)
        return; /* the reader sees that the end is missing */
    if (filled + size > roomy && !disk_has_room(text + roomy, STEP)) {
        end_on_full_disk();
        return;
    }
    if (filled + size > roomy)
        roomy += STEP;
    memcpy(text + filled, line, size);
    filled += size;
}

void timeline_line(const char *format, ...)
{
    char line[1024];
    va_list list;
    va_start(list, format);
    int n = vsnprintf(line, sizeof line - 1, format, list);
    va_end(list);
    if (n < 0)
        return;
    size_t size = (size_t)n < sizeof line - 1 ? (size_t)n : sizeof line - 2;
    for (size_t i = 0; i < size; ++i)
        if (line[i] == '\n' || !line[i])
            line[i] = ' ';
    line[size++] = '\n';
    put(line, size);
}

void timeline_trace(const char *format, ...)
{
    char line[1024];
    void *frames[FRAMES];
    va_list list;
    if (!text)
        return;
    va_start(list, format);
    int n = vsnprintf(line, 256, format, list);
    va_end(list);
    size_t size = n < 0 ? 0 : (size_t)n < 255 ? (size_t)n : 255;
    if (!engine_end)
        dl_iterate_phdr(find_engine, NULL);
    int depth = engine_end ? backtrace(frames, FRAMES) : 0, kept = 0;
    size += (size_t)snprintf(line + size, sizeof line - size, " @");
    for (int i = 0; i < depth && kept < KEPT; ++i) {
        uintptr_t pc = (uintptr_t)frames[i];
        if (pc <= engine_begin || pc > engine_end)
            continue;
        size += (size_t)snprintf(line + size, sizeof line - size, kept ? ",%lx" : "%lx",
                                 (unsigned long)(pc - engine_base));
        ++kept;
    }
    line[size++] = '\n';
    put(line, size);
}
