/* NVML stand-in: memory, processes, MIG instances; all sizes are bytes. */
#include "nvml.h"

struct memory { u64 total, free, used; };
struct memory_v2 { u32 version; u64 total, reserved, free, used; };

static int read_memory(device d, struct memory_v2 *out)
{
    char n[64];
    CHECK(d);
    nvml_name(d, n);
    if (!HAS("%s.total", n))
        return NOT_SUPPORTED;
    out->total = NUMBER(0, "%s.total", n);
    out->reserved = NUMBER(0, "%s.reserved", n);
    out->used = NUMBER(0, "%s.used", n);
    out->free = out->total - out->reserved - out->used;
    return SUCCESS;
}
API nvmlDeviceGetMemoryInfo(device d, struct memory *out)
{
    struct memory_v2 info;
    int error = read_memory(d, &info);
    if (error)
        return error;
    out->total = info.total;
    out->free = info.free;
    out->used = info.used + info.reserved;
    return SUCCESS;
}
API nvmlDeviceGetMemoryInfo_v2(device d, struct memory_v2 *out)
{
    if (out->version != (sizeof *out | 2u << 24))
        return VERSION_MISMATCH;
    return read_memory(d, out);
}

struct process_v1 { u32 pid; u64 bytes; };
struct process { u32 pid; u64 bytes; u32 gi, ci; };

static int list(device d, const char *kind, u32 *count, struct process *out)
{
    char n[64], b[TEXT];
    CHECK(d);
    nvml_name(d, n);
    u32 have = (u32)NUMBER(0, "%s.%s", n, kind), room = *count;
    *count = have;
    if (!have)
        return SUCCESS;
    if (!out || room < have)
        return INSUFFICIENT_SIZE;
    for (u32 i = 0; i < have; i++) {
        const char *text = nvml_value(b, "%s.%s.%u", n, kind, i);
        long long bytes = -1;
        out[i] = (struct process){.gi = ~0u, .ci = ~0u};
        if (text)
            sscanf(text, "%u %lld", &out[i].pid, &bytes);
        out[i].bytes = bytes < 0 ? ~0ull : (u64)bytes;
    }
    return SUCCESS;
}
/* The oldest form of the list has no instances. */
static int list_v1(device d, const char *kind, u32 *count, struct process_v1 *out)
{
    struct process rows[1024];
    u32 room = out && *count < 1024 ? *count : out ? 1024 : 0;
    int error = list(d, kind, &room, rows);
    for (u32 i = 0; !error && i < room; i++)
        out[i] = (struct process_v1){rows[i].pid, rows[i].bytes};
    *count = room;
    return error;
}

#define LIST(name, kind) \
    API name(device d, u32 *count, struct process_v1 *out) { return list_v1(d, kind, count, out); } \
    API name##_v2(device d, u32 *count, struct process *out) { return list(d, kind, count, out); } \
    API name##_v3(device d, u32 *count, struct process *out) { return list(d, kind, count, out); }
LIST(nvmlDeviceGetComputeRunningProcesses, "compute")
LIST(nvmlDeviceGetGraphicsRunningProcesses, "graphics")
API nvmlDeviceGetMPSComputeRunningProcesses_v3(device d, u32 *count, struct process *out)
{
    (void)out;
    CHECK(d);
    *count = 0;
    return SUCCESS;
}

API nvmlDeviceGetMigMode(device d, u32 *current, u32 *pending)
{
    int error = nvml_number(d, "mig", current);
    *pending = *current;
    return error;
}
API nvmlDeviceGetMaxMigDeviceCount(device d, u32 *out)
{
    CHECK(d);
    *out = 7;
    return SUCCESS;
}
API nvmlDeviceGetMigDeviceHandleByIndex(device d, u32 index, device *out)
{
    CHECK(d);
    if (!HAS("gpu.%d.mig.%u.uuid", gpu_of(d), index))
        return NOT_FOUND;
    *out = (device)(size_t)(1000 + 100 * gpu_of(d) + index);
    return SUCCESS;
}
API nvmlDeviceGetDeviceHandleFromMigDeviceHandle(device d, device *out)
{
    *out = (device)(size_t)(1 + gpu_of(d));
    return SUCCESS;
}
API nvmlDeviceIsMigDeviceHandle(device d, u32 *out)
{
    *out = (u32)is_mig(d);
    return SUCCESS;
}

struct attributes { u32 sms, copy, decoders, encoders, jpeg, ofa, gpu_slices, compute_slices; u64 mib; };

API nvmlDeviceGetAttributes_v2(device d, struct attributes *out)
{
    char n[64];
    CHECK(d);
    if (!is_mig(d))
        return NOT_SUPPORTED;
    memset(out, 0, sizeof *out);
    out->sms = (u32)NUMBER(0, "%s.sms", nvml_name(d, n));
    out->mib = NUMBER(0, "%s.total", n) >> 20;
    return SUCCESS;
}
