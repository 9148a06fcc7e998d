/* Stream-ordered pools: each holds its high-water mark, rounded up to the scenario's pool_step,
 * and gives back what is above its release threshold when its device synchronises. */
#include "state.h"

#include <stdlib.h>

static struct pretend_pool *pools, defaults[PRETEND_MAX_DEVICES];
static int pool_count;

void pools_start(void)
{
    for (int i = 0; i < machine.count; ++i) {
        defaults[i] = (struct pretend_pool){
            .device = i, .id = pool_count++, .open = 1, .step = machine.pool_step};
        defaults[i].next = pools;
        pools = &defaults[i];
    }
}

void pools_leave(void)
{
    for (struct pretend_pool *p = pools; p; p = p->next)
        p->live = p->reserved = 0;
}

static int hold_pool(struct pretend_pool *pool, size_t size)
{
    size_t wanted = round_up(pool->live + size, pool->step);
    if (wanted > pool->reserved) {
        int status = hold(pool->device, PRETEND_POOL, pool->id, size, pool->reserved, wanted);
        if (status)
            return status;
        pool->reserved = wanted;
    }
    pool->live += size;
    return PRETEND_OK;
}

static void shrink(struct pretend_pool *pool, size_t keep)
{
    size_t wanted = round_up(pool->live > keep ? pool->live : keep, pool->step);
    if (wanted >= pool->reserved)
        return;
    unhold(pool->device, pool->reserved - wanted);
    pool->reserved = wanted;
    timeline_line("R %d %d %zu %zu", pool->device, pool->id, wanted, held_on(pool->device));
}

static void close_pool(struct pretend_pool *pool)
{
    for (struct pretend_pool **p = &pools; *p; p = &(*p)->next) {
        if (*p == pool) {
            *p = pool->next;
            free(pool);
            return;
        }
    }
}

void pool_returned(struct pretend_pool *pool, size_t size)
{
    pool->live -= size;
    if (pool->open)
        return;
    shrink(pool, 0);
    if (!pool->live)
        close_pool(pool);
}

int pretend_pool_malloc(struct pretend_pool *pool, size_t size, void **out)
{
    *out = NULL;
    if (!pool || !pool->open)
        return PRETEND_INVALID;
    if (!size)
        return PRETEND_OK;
    enter();
    size = accounted(size, UNIT);
    int status = fails(pool->device, PRETEND_POOL, pool->id, size) ? PRETEND_NO_MEMORY
                 : hold_pool(pool, size);
    if (!status)
        status = give_block(pool->device, PRETEND_POOL, pool, size, out);
    leave();
    return status;
}

struct pretend_pool *pretend_pool_default(int device)
{
    int physical = physical_of(device);
    return physical < 0 ? NULL : &defaults[physical];
}

struct pretend_pool *pretend_pool_create(int device)
{
    int physical = physical_of(device);
    struct pretend_pool *pool = physical < 0 ? NULL : calloc(1, sizeof *pool);
    if (!pool)
        return NULL;
    enter();
    pool->device = physical;
    pool->id = pool_count++;
    pool->open = 1;
    pool->step = machine.pool_step;
    pool->next = pools;
    pools = pool;
    timeline_trace("C %d %d", physical, pool->id);
    leave();
    return pool;
}

int pretend_pool_destroy(struct pretend_pool *pool)
{
    if (!pool || (pool >= defaults && pool < defaults + PRETEND_MAX_DEVICES))
        return PRETEND_INVALID;
    enter();
    pool->open = 0;
    shrink(pool, 0);
    if (!pool->live)
        close_pool(pool);
    leave();
    return PRETEND_OK;
}

void pretend_pool_threshold(struct pretend_pool *pool, uint64_t bytes)
{
    if (pool)
        pool->threshold = bytes;
}

void pretend_pool_step(struct pretend_pool *pool, size_t step)
{
    if (pool)
        pool->step = step;
}

void pretend_pool_trim(struct pretend_pool *pool, size_t keep)
{
    if (!pool)
        return;
    enter();
    shrink(pool, keep);
    leave();
}

void pretend_synchronised(int device)
{
    int physical = physical_of(device);
    if (physical < 0)
        return;
    enter();
    for (struct pretend_pool *p = pools; p; p = p->next)
        if (p->device == physical && p->threshold < p->reserved)
            shrink(p, p->threshold);
    leave();
}

