/* Kernels that a library holds without code for a card: the host part launches them, and nothing
 * is computed. The scenario names a file for each compute capability, one mangled name a line, in
 * the order of strcmp (../empty.py). A launch of one ends the process. */
#define _GNU_SOURCE
#include "effects.h"
#include "account.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST_LISTS 8
#define MOST_KERNELS 4096

static struct list {
    int major, minor;
    char *text;    /* the whole file; its lines end with 0 */
    char **names;
    size_t count;
} lists[MOST_LISTS];
static int list_count;
static struct { const void *host; char *name; unsigned lists; } kernels[MOST_KERNELS];
static size_t kernel_count;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static int by_name(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static char *whole(const char *path)
{
    FILE *file = fopen(path, "rb");
    char *text = NULL;
    long size;
    if (file && !fseek(file, 0, SEEK_END) && (size = ftell(file)) >= 0) {
        rewind(file);
        text = calloc((size_t)size + 1, 1);
        if (text && fread(text, 1, (size_t)size, file) != (size_t)size) {
            free(text);
            text = NULL;
        }
    }
    if (file)
        fclose(file);
    return text;
}

static void read_list(int major, int minor, const char *path)
{
    struct list *list = &lists[list_count];
    size_t room = 1;
    if (list_count == MOST_LISTS || !(list->text = whole(path)))
        return;
    for (char *at = list->text; (at = strchr(at, '\n')); ++at)
        ++room;
    if (!(list->names = calloc(room, sizeof *list->names)))
        return;
    for (char *rest = list->text, *name; (name = strsep(&rest, "\n"));)
        if (*name)
            list->names[list->count++] = name;
    list->major = major;
    list->minor = minor;
    ++list_count;
}

static void read_lists(void)
{
    int major, minor;
    const char *path;
    for (int i = 0; (path = pretend_empty_kernels(i, &major, &minor)); ++i)
        read_list(major, minor, path);
}

void empty_register(const void *host, const char *name)
{
    unsigned found = 0;
    pthread_once(&once, read_lists);
    for (int i = 0; name && i < list_count; ++i)
        if (bsearch(&name, lists[i].names, lists[i].count, sizeof name, by_name))
            found |= 1u << i;
    if (!found || kernel_count == MOST_KERNELS)
        return;
    kernels[kernel_count].host = host;
    kernels[kernel_count].name = strdup(name);
    kernels[kernel_count++].lists = found;
}

void empty_refuse(const void *host)
{
    const struct pretend_device *device = NULL;
    for (size_t k = 0; k < kernel_count; ++k) {
        if (kernels[k].host != host)
            continue;
        if (!device && !(device = pretend_device(*pretend_current_device())))
            return;
        for (int i = 0; i < list_count; ++i)
            if (kernels[k].lists & 1u << i && lists[i].major == device->major &&
                lists[i].minor == device->minor) {
                fprintf(stderr,
                        "turbofit pretend: %s (compute capability %d.%d) has no code for the"
                        " kernel %s: it is empty\n",
                        device->name, device->major, device->minor, kernels[k].name);
                abort();
            }
    }
}
