/* What one process sees of the machine: CUDA_VISIBLE_DEVICES read as CUDA reads it (as
 * turbofit/machine/visible.py does), and the identity of each card. */
#define _GNU_SOURCE
#include "machine.h"
#include "state.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

static int order[PRETEND_MAX_DEVICES], shown;

/* ---------------------------------------------------------------- identity */

int machine_uuid(int physical, unsigned char out[16])
{
    static const char name[11] = "pretend gpu";
    if (physical < 0 || physical >= machine.count)
        return PRETEND_INVALID;
    uint32_t first = (uint32_t)(physical + 1) * 2654435761u; /* so that prefixes tell them apart */
    for (int i = 0; i < 4; ++i)
        out[i] = (unsigned char)(first >> (24 - 8 * i));
    memcpy(out + 4, name, sizeof name);
    out[15] = (unsigned char)physical;
    return PRETEND_OK;
}

int machine_uuid_text(int physical, char out[PRETEND_UUID_TEXT])
{
    unsigned char u[16];
    if (machine_uuid(physical, u))
        return PRETEND_INVALID;
    char *at = out + sprintf(out, "GPU-");
    for (int i = 0; i < 16; ++i)
        at += sprintf(at, i == 4 || i == 6 || i == 8 || i == 10 ? "-%02x" : "%02x", u[i]);
    return PRETEND_OK;
}

/* -------------------------------------------------------------- visibility */

static int by_uuid(const char *entry)
{
    int found = -1, matches = 0;
    char text[PRETEND_UUID_TEXT];
    for (int i = 0; i < machine.count; ++i) {
        machine_uuid_text(i, text);
        if (!strncasecmp(text, entry, strlen(entry))) {
            found = i;
            ++matches;
        }
    }
    return matches == 1 ? found : -1;
}

/* Leading digits count and what follows them does not matter, as in CUDA. */
static int by_number(const char *entry)
{
    char *end;
    long n = strtol(entry, &end, 10);
    return end != entry && n >= 0 && n < machine.count ? (int)n : -1;
}

static void read_list(char *list)
{
    int uuids = -1;
    char *rest = list, *entry;
    while ((entry = strsep(&rest, ","))) {
        while (isspace((unsigned char)*entry))
            ++entry;
        for (char *end = entry + strlen(entry); end > entry && isspace((unsigned char)end[-1]);)
            *--end = 0;
        if (uuids < 0)
            uuids = !strncmp(entry, "GPU-", 4);
        int index = uuids ? strncmp(entry, "GPU-", 4) ? -1 : by_uuid(entry) : by_number(entry);
        if (index < 0)
            return; /* it hides itself and all after it */
        for (int i = 0; i < shown; ++i) {
            if (order[i] == index) {
                shown = 0; /* one named twice hides everything */
                return;
            }
        }
        order[shown++] = index;
    }
}

void visible_read(void)
{
    const char *value = getenv("CUDA_VISIBLE_DEVICES");
    shown = 0;
    if (!value) {
        for (; shown < machine.count; ++shown)
            order[shown] = shown;
        return;
    }
    char *list = strdup(value);
    if (list)
        read_list(list);
    free(list);
}

int physical_of(int device)
{
    account_start();
    return device >= 0 && device < shown ? order[device] : -1;
}

int visible_of(int physical)
{
    for (int i = 0; i < shown; ++i)
        if (order[i] == physical)
            return i;
    return -1;
}

/* ------------------------------------------------------------------- calls */

int pretend_device_count(void)
{
    account_start();
    return shown;
}

int pretend_physical(int device) { return physical_of(device); }

int pretend_uuid(int device, unsigned char out[16]) { return machine_uuid(physical_of(device), out); }

const struct pretend_device *pretend_device(int device)
{
    int physical = physical_of(device);
    return physical < 0 ? NULL : &machine.devices[physical];
}

int pretend_can_access(int from, int to)
{
    int a = physical_of(from), b = physical_of(to);
    return a >= 0 && b >= 0 && (a == b || machine.peers[a][b]);
}
