/* Virtual memory management: physical memory by handle, mapped anywhere. Memory is held until
 * neither its handle nor a mapping is left. */
#define _GNU_SOURCE
#include "state.h"

#include <stdlib.h>
#include <sys/mman.h>

struct handle {
    uint64_t id;
    int device, references; /* device (physical) -1: a multicast object, without memory of its own */
    size_t size;
    struct handle *next;
};

struct mapping {
    char *address;
    size_t size;
    uint64_t handle;
    struct mapping *next;
};

static struct handle *handles;
static struct mapping *mappings;
static uint64_t next_handle = 1;

static struct handle *find_handle(uint64_t id)
{
    struct handle *h = handles;
    while (h && h->id != id)
        h = h->next;
    return h;
}

static struct mapping **mapping_of(const void *pointer)
{
    struct mapping **p = &mappings;
    while (*p && ((const char *)pointer < (*p)->address ||
                  (const char *)pointer >= (*p)->address + (*p)->size))
        p = &(*p)->next;
    return p;
}

void vmm_leave(void)
{
    for (struct handle *h = handles; h; h = h->next)
        h->size = 0;
}

int vmm_device(const void *pointer)
{
    enter();
    struct mapping *m = *mapping_of(pointer);
    struct handle *h = m ? find_handle(m->handle) : NULL;
    leave();
    return h ? h->device : -1;
}

size_t pretend_vmm_granularity(void)
{
    account_start();
    return machine.vmm_step;
}

int pretend_vmm_create(int device, size_t size, uint64_t *out)
{
    device = physical_of(device);
    if (device < 0)
        return PRETEND_INVALID;
    struct handle *h = malloc(sizeof *h);
    if (!h)
        return PRETEND_NO_MEMORY;
    enter();
    size = accounted(size, machine.vmm_step);
    int status = fails(device, PRETEND_VMM, -1, size) ? PRETEND_NO_MEMORY
                 : hold(device, PRETEND_VMM, -1, size, 0, size);
    if (status) {
        free(h);
    } else {
        *h = (struct handle){next_handle++, device, 1, size, handles};
        handles = h;
        *out = h->id;
        timeline_trace("A %d %d -1 %zu %zu v%zx", device, PRETEND_VMM, size, held_on(device),
                       (size_t)h->id);
    }
    leave();
    return status;
}

int pretend_vmm_multicast(uint64_t *out)
{
    struct handle *h = malloc(sizeof *h);
    if (!h)
        return PRETEND_NO_MEMORY;
    enter();
    *h = (struct handle){next_handle++, -1, 1, 0, handles};
    handles = h;
    *out = h->id;
    leave();
    return PRETEND_OK;
}

int pretend_vmm_retain(uint64_t id)
{
    enter();
    struct handle *h = find_handle(id);
    if (h)
        ++h->references;
    leave();
    return h ? PRETEND_OK : PRETEND_INVALID;
}

static int release(uint64_t id)
{
    for (struct handle **p = &handles; *p; p = &(*p)->next) {
        struct handle *h = *p;
        if (h->id != id)
            continue;
        if (--h->references == 0) {
            if (h->device >= 0) {
                unhold(h->device, h->size);
                timeline_line("F v%zx %zu", (size_t)h->id, held_on(h->device));
            }
            *p = h->next;
            free(h);
        }
        return PRETEND_OK;
    }
    return PRETEND_INVALID;
}

int pretend_vmm_release(uint64_t id)
{
    enter();
    int status = release(id);
    leave();
    return status;
}

int pretend_vmm_reserve(size_t size, void **out)
{
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                   -1, 0);
    *out = p == MAP_FAILED ? NULL : p;
    return p == MAP_FAILED ? PRETEND_NO_MEMORY : PRETEND_OK;
}

int pretend_vmm_unreserve(void *pointer, size_t size)
{
    return munmap(pointer, size) ? PRETEND_INVALID : PRETEND_OK;
}

int pretend_vmm_map(void *pointer, size_t size, uint64_t id)
{
    struct mapping *m = malloc(sizeof *m);
    if (!m)
        return PRETEND_NO_MEMORY;
    enter();
    struct handle *h = find_handle(id);
    if (h) {
        ++h->references; /* a mapping keeps the memory after its handle is released */
        *m = (struct mapping){pointer, size, id, mappings};
        mappings = m;
    } else {
        free(m);
    }
    leave();
    return h ? PRETEND_OK : PRETEND_INVALID;
}

int pretend_vmm_unmap(void *pointer, size_t size)
{
    (void)size;
    enter();
    struct mapping **p = mapping_of(pointer), *m = *p;
    if (m) {
        *p = m->next;
        release(m->handle);
        free(m);
    }
    leave();
    return m ? PRETEND_OK : PRETEND_INVALID;
}

int pretend_vmm_handle_at(const void *pointer, uint64_t *handle)
{
    enter();
    struct mapping *m = *mapping_of(pointer);
    if (m) {
        *handle = m->handle;
        ++find_handle(m->handle)->references;
    }
    leave();
    return m ? PRETEND_OK : PRETEND_INVALID;
}

int pretend_vmm_access(const void *pointer, int device)
{
    enter();
    struct mapping *m = *mapping_of(pointer);
    struct handle *h = m ? find_handle(m->handle) : NULL;
    int status = !h ? PRETEND_INVALID
                 : h->device < 0 || pretend_can_access(device, visible_of(h->device)) ? PRETEND_OK : PRETEND_NO_PEER;
    if (status == PRETEND_NO_PEER)
        timeline_trace("X %d %d", physical_of(device), h->device);
    leave();
    return status;
}
