/* Reads the scenario file: one line a device, a peer pair or a knob. See ../scenario.py. */
#define _GNU_SOURCE
#include "state.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct scenario machine = {
    .pool_step = 32 * MIB,
    .malloc_step = 2 * MIB,
    .vmm_step = 2 * MIB,
    .pinned_limit = (size_t)-1,
    .timeline_limit = 256 * MIB,
};

static int read_device(const char *line)
{
    struct pretend_device *d = &machine.devices[machine.count];
    unsigned long long total, used, late, l2, smem_sm, smem_block;
    int at = 0;
    if (machine.count == PRETEND_MAX_DEVICES ||
        sscanf(line, "device %llu %llu %llu %d %d %d %llu %llu %llu %n", &total, &used, &late,
               &d->major, &d->minor, &d->sm_count, &l2, &smem_sm, &smem_block, &at) < 9 ||
        !at)
        return 0;
    d->total = total;
    d->used = used;
    d->late = late;
    d->l2 = l2;
    d->smem_sm = smem_sm;
    d->smem_block = smem_block;
    snprintf(d->name, sizeof d->name, "%s", line + at);
    ++machine.count;
    return 1;
}

static void read_knob(const char *line)
{
    const struct { const char *name; size_t *value; } knobs[] = {
        {"pool_step", &machine.pool_step},       {"pinned_limit", &machine.pinned_limit},
        {"timeline_limit", &machine.timeline_limit}, {"context", &machine.context},
        {"fail_at", &machine.fail_at},           {"fail_pinned_at", &machine.fail_pinned_at},
    };
    char name[64];
    unsigned long long value;
    if (sscanf(line, "%63s %llu", name, &value) != 2)
        return;
    for (size_t i = 0; i < sizeof knobs / sizeof *knobs; ++i)
        if (!strcmp(name, knobs[i].name))
            *knobs[i].value = value;
}

static void read_line(const char *line)
{
    int a, b;
    unsigned long long bytes;
    if (read_device(line))
        return;
    if (!strncmp(line, "timeline ", 9)) {
        snprintf(machine.timeline, sizeof machine.timeline, "%s", line + 9);
    } else if (!strncmp(line, "shared ", 7)) {
        snprintf(machine.shared, sizeof machine.shared, "%s", line + 7);
    } else if (sscanf(line, "reserved %d %llu", &a, &bytes) == 2) {
        if (a >= 0 && a < PRETEND_MAX_DEVICES)
            machine.devices[a].reserved = bytes;
    } else if (sscanf(line, "peer %d %d", &a, &b) == 2) {
        if (a >= 0 && b >= 0 && a < PRETEND_MAX_DEVICES && b < PRETEND_MAX_DEVICES)
            machine.peers[a][b] = 1;
    } else {
        read_knob(line);
    }
}

void scenario_read(void)
{
    const char *path = getenv("TURBOFIT_PRETEND_SCENARIO");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[4096];
    if (!file) {
        fputs("turbofit pretend: no scenario, hence no devices\n", stderr);
        return;
    }
    while (fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = 0;
        read_line(line);
    }
    fclose(file);
}
