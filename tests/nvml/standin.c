/* A stand-in for libnvidia-ml.so.1 that plays a scenario file, for tests of programs that use NVML.
 *
 * The file named by NVML_STANDIN_SCENARIO has one "key value" a line (see standin.py, which writes
 * it) and is read again on every call, so that a test can change the machine in flight. Without a
 * file the library answers "driver not loaded". Handles are numbers: GPU i is 1 + i, MIG instance k
 * of it is 1000 + 100 * i + k.
 */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned int u32;
typedef unsigned long long u64;
typedef const void *device;

enum {
    SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9, FUNCTION_NOT_FOUND = 13, GPU_IS_LOST = 15, VERSION_MISMATCH = 25, UNKNOWN = 999
};

#define API __attribute__((visibility("default"))) int
#define TEXT 512

/* The value of a key, or NULL; one buffer a call site is enough because values are used at once. */
static const char *get(char out[TEXT], const char *format, ...)
{
    char key[TEXT], line[TEXT];
    const char *path = getenv("NVML_STANDIN_SCENARIO");
    va_list args;
    va_start(args, format);
    int length = vsnprintf(key, sizeof key, format, args);
    va_end(args);
    FILE *file = path ? fopen(path, "r") : NULL;
    if (!file)
        return NULL;
    const char *found = NULL;
    while (!found && fgets(line, sizeof line, file))
        if (!strncmp(line, key, length) && line[length] == ' ') {
            line[strcspn(line, "\n")] = 0;
            snprintf(out, TEXT, "%s", line + length + 1);
            found = out;
        }
    fclose(file);
    return found;
}

#define NUMBER(fallback, ...) \
    ({ char b_[TEXT]; const char *v_ = get(b_, __VA_ARGS__); v_ ? strtoull(v_, NULL, 0) : (u64)(fallback); })
#define HAS(...) ({ char b_[TEXT]; get(b_, __VA_ARGS__) != NULL; })

static int is_mig(device d) { return (size_t)d >= 1000; }
static int gpu_of(device d)
{
    return is_mig(d) ? ((int)(size_t)d - 1000) / 100 : (int)(size_t)d - 1;
}
static int part_of(device d) { return ((int)(size_t)d - 1000) % 100; }

/* The prefix of a device's keys: "gpu.0" or "gpu.0.mig.1". */
static const char *name_of(device d, char out[64])
{
    if (is_mig(d))
        snprintf(out, 64, "gpu.%d.mig.%d", gpu_of(d), part_of(d));
    else
        snprintf(out, 64, "gpu.%d", gpu_of(d));
    return out;
}

static int state_of(device d)
{
    return (int)NUMBER(SUCCESS, "gpu.%d.error", gpu_of(d));
}

#define CHECK(d) do { int e_ = state_of(d); if (e_) return e_; } while (0)

static int copy(char *to, u32 size, const char *text)
{
    if (!text)
        return NOT_SUPPORTED;
    if (strlen(text) >= size)
        return INSUFFICIENT_SIZE;
    strcpy(to, text);
    return SUCCESS;
}

API nvmlInitWithFlags(u32 flags)
{
    (void)flags;
    return HAS("gpus") ? (int)NUMBER(SUCCESS, "init_error") : DRIVER_NOT_LOADED;
}
API nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
API nvmlShutdown(void) { return SUCCESS; }

__attribute__((visibility("default"))) const char *nvmlErrorString(int code)
{
    switch (code) {
    case SUCCESS: return "Success";
    case INVALID_ARGUMENT: return "Invalid Argument";
    case NOT_SUPPORTED: return "Not Supported";
    case NOT_FOUND: return "Not Found";
    case INSUFFICIENT_SIZE: return "Insufficient Size";
    case DRIVER_NOT_LOADED: return "Driver Not Loaded";
    case GPU_IS_LOST: return "GPU is lost";
    case VERSION_MISMATCH: return "Argument version mismatch";
    default: return "Unknown Error";
    }
}

API nvmlSystemGetDriverVersion(char *out, u32 size)
{
    char b[TEXT];
    return copy(out, size, get(b, "driver"));
}
API nvmlSystemGetNVMLVersion(char *out, u32 size) { return copy(out, size, "12.570.00"); }
API nvmlSystemGetCudaDriverVersion_v2(int *out)
{
    *out = (int)NUMBER(12080, "cuda");
    return SUCCESS;
}
API nvmlSystemGetCudaDriverVersion(int *out) { return nvmlSystemGetCudaDriverVersion_v2(out); }

API nvmlSystemGetProcessName(u32 pid, char *out, u32 size)
{
    char b[TEXT];
    const char *text = get(b, "process.%u", pid);
    return text ? copy(out, size, text) : NOT_FOUND;
}

API nvmlDeviceGetCount_v2(u32 *out)
{
    *out = (u32)NUMBER(0, "gpus");
    return SUCCESS;
}
API nvmlDeviceGetHandleByIndex_v2(u32 index, device *out)
{
    if (index >= NUMBER(0, "gpus"))
        return INVALID_ARGUMENT;
    if (HAS("gpu.%u.no_handle", index))
        return (int)NUMBER(GPU_IS_LOST, "gpu.%u.no_handle", index);
    *out = (device)(size_t)(1 + index);
    return SUCCESS;
}
API nvmlDeviceGetHandleByUUID(const char *uuid, device *out)
{
    char b[TEXT];
    for (u32 i = 0; i < NUMBER(0, "gpus"); i++) {
        const char *text = get(b, "gpu.%u.uuid", i);
        if (text && !strcmp(text, uuid)) {
            *out = (device)(size_t)(1 + i);
            return SUCCESS;
        }
    }
    return NOT_FOUND;
}
API nvmlDeviceGetIndex(device d, u32 *out)
{
    *out = (u32)gpu_of(d);
    return SUCCESS;
}
API nvmlDeviceGetMinorNumber(device d, u32 *out) { return nvmlDeviceGetIndex(d, out); }

API nvmlDeviceGetName(device d, char *out, u32 size)
{
    char b[TEXT], n[64];
    return copy(out, size, get(b, "%s.name", name_of(d, n)));
}
API nvmlDeviceGetUUID(device d, char *out, u32 size)
{
    char b[TEXT], n[64];
    return copy(out, size, get(b, "%s.uuid", name_of(d, n)));
}

struct pci {
    char legacy[16];
    u32 domain, bus, device, id, subsystem;
    char text[32];
};

static void fill_pci(struct pci *out, u32 bus)
{
    memset(out, 0, sizeof *out);
    out->bus = bus;
    snprintf(out->text, sizeof out->text, "00000000:%02X:00.0", bus);
    snprintf(out->legacy, sizeof out->legacy, "0000:%02X:00.0", bus);
}

API nvmlDeviceGetPciInfo_v3(device d, struct pci *out)
{
    CHECK(d);
    fill_pci(out, (u32)NUMBER(gpu_of(d) + 1, "gpu.%d.bus", gpu_of(d)));
    return SUCCESS;
}

API nvmlDeviceGetCudaComputeCapability(device d, int *major, int *minor)
{
    CHECK(d);
    u64 cc = NUMBER(0, "gpu.%d.cc", gpu_of(d));
    if (!cc)
        return NOT_SUPPORTED;
    *major = (int)(cc / 10);
    *minor = (int)(cc % 10);
    return SUCCESS;
}

/* A number of the device's own, or "not supported" where the scenario has none. */
static int number(device d, const char *key, u32 *out)
{
    char n[64];
    CHECK(d);
    if (!HAS("%s.%s", name_of(d, n), key))
        return NOT_SUPPORTED;
    *out = (u32)NUMBER(0, "%s.%s", n, key);
    return SUCCESS;
}
API nvmlDeviceGetNumGpuCores(device d, u32 *out) { return number(d, "cores", out); }
API nvmlDeviceGetMaxPcieLinkGeneration(device d, u32 *out) { return number(d, "pcie_generation", out); }
API nvmlDeviceGetMaxPcieLinkWidth(device d, u32 *out) { return number(d, "pcie_width", out); }

/* The same for what only `turbofit doctor` asks: KEY_error answers with that code instead. */
static int condition(device d, const char *key, u32 *out)
{
    char n[64];
    CHECK(d);
    if (HAS("%s.%s_error", name_of(d, n), key))
        return (int)NUMBER(UNKNOWN, "%s.%s_error", n, key);
    return number(d, key, out);
}
static int condition_64(device d, const char *key, u64 *out)
{
    u32 value = 0;
    int error = condition(d, key, &value);
    *out = value;
    return error;
}
API nvmlDeviceGetCurrPcieLinkGeneration(device d, u32 *out) { return condition(d, "pcie_generation_now", out); }
API nvmlDeviceGetCurrPcieLinkWidth(device d, u32 *out) { return condition(d, "pcie_width_now", out); }
API nvmlDeviceGetPerformanceState(device d, u32 *out) { return condition(d, "pstate", out); }
API nvmlDeviceGetPersistenceMode(device d, u32 *out) { return condition(d, "persistence", out); }
API nvmlDeviceGetTemperature(device d, u32 sensor, u32 *out)
{
    (void)sensor;
    return condition(d, "temperature", out);
}
API nvmlDeviceGetEccMode(device d, u32 *current, u32 *pending)
{
    int error = condition(d, "ecc", current);
    *pending = *current;
    return error;
}
API nvmlDeviceGetTotalEccErrors(device d, u32 type, u32 counter, u64 *out)
{
    (void)type, (void)counter;
    return condition_64(d, "ecc_errors", out);
}
API nvmlDeviceGetRemappedRows(device d, u32 *corrected, u32 *uncorrected, u32 *pending, u32 *failed)
{
    *corrected = *uncorrected = *failed = 0;
    condition(d, "rows_failed", failed);
    return condition(d, "rows_pending", pending);
}
API nvmlDeviceGetCurrentClocksEventReasons(device d, u64 *out) { return condition_64(d, "slow", out); }
API nvmlDeviceGetCurrentClocksThrottleReasons(device d, u64 *out) { return condition_64(d, "slow", out); }
API nvmlDeviceGetGpuInstanceId(device d, u32 *out) { return number(d, "gi", out); }
API nvmlDeviceGetComputeInstanceId(device d, u32 *out) { return number(d, "ci", out); }

struct memory { u64 total, free, used; };
struct memory_v2 { u32 version; u64 total, reserved, free, used; };

static int read_memory(device d, struct memory_v2 *out)
{
    char n[64];
    CHECK(d);
    name_of(d, n);
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
    if (NUMBER(0, "memory_v1") || out->version != (sizeof *out | 2u << 24))
        return VERSION_MISMATCH;
    return read_memory(d, out);
}

struct process { u32 pid; u64 bytes; u32 gi, ci; };

static int list(device d, const char *kind, u32 *count, struct process *out)
{
    char n[64], b[TEXT];
    CHECK(d);
    name_of(d, n);
    u32 have = (u32)NUMBER(0, "%s.%s", n, kind), room = *count;
    *count = have;
    if (!have)
        return SUCCESS;
    if (!out || room < have)
        return INSUFFICIENT_SIZE;
    for (u32 i = 0; i < have; i++) {
        const char *text = get(b, "%s.%s.%u", n, kind, i);
        long long bytes = -1;
        out[i] = (struct process){.gi = ~0u, .ci = ~0u};
        if (text)
            sscanf(text, "%u %lld", &out[i].pid, &bytes);
        out[i].bytes = bytes < 0 ? ~0ull : (u64)bytes;
    }
    return SUCCESS;
}
/* A driver that has memory info version 1 only has no version 3 of the lists either. */
#define LIST(name, kind) \
    API name##_v2(device d, u32 *count, struct process *out) { return list(d, kind, count, out); } \
    API name##_v3(device d, u32 *count, struct process *out) \
    { \
        return NUMBER(0, "memory_v1") ? FUNCTION_NOT_FOUND : list(d, kind, count, out); \
    }
LIST(nvmlDeviceGetComputeRunningProcesses, "compute")
LIST(nvmlDeviceGetGraphicsRunningProcesses, "graphics")
API nvmlDeviceGetMPSComputeRunningProcesses_v3(device d, u32 *count, struct process *out)
{
    (void)out;
    CHECK(d);
    *count = 0;
    return SUCCESS;
}

API nvmlDeviceGetP2PStatus(device a, device b, int capability, int *out)
{
    char t[TEXT];
    int status[3] = {5, 5, 5};
    CHECK(a);
    CHECK(b);
    if (capability < 0 || capability > 2)
        return NOT_SUPPORTED;
    const char *text = get(t, "p2p.%d.%d", gpu_of(a), gpu_of(b));
    if (!text)
        text = get(t, "p2p");
    if (!text)
        return NOT_SUPPORTED;
    sscanf(text, "%d %d %d", &status[0], &status[1], &status[2]);
    *out = status[capability];
    return SUCCESS;
}
API nvmlDeviceGetTopologyCommonAncestor(device a, device b, int *out)
{
    CHECK(a);
    CHECK(b);
    if (HAS("ancestor.%d.%d", gpu_of(a), gpu_of(b)))
        *out = (int)NUMBER(0, "ancestor.%d.%d", gpu_of(a), gpu_of(b));
    else if (HAS("ancestor"))
        *out = (int)NUMBER(0, "ancestor");
    else
        return NOT_SUPPORTED;
    return SUCCESS;
}

/* "gpu.I.nvlinks N" lanes exist; "gpu.I.nvlink.L" is the other end's bus, "switch" or "off". */
static int lane(device d, u32 link, char out[TEXT])
{
    CHECK(d);
    if (is_mig(d) || !HAS("gpu.%d.nvlinks", gpu_of(d)))
        return NOT_SUPPORTED;
    if (link >= NUMBER(0, "gpu.%d.nvlinks", gpu_of(d)))
        return INVALID_ARGUMENT;
    if (!get(out, "gpu.%d.nvlink.%u", gpu_of(d), link))
        strcpy(out, "off");
    return SUCCESS;
}
API nvmlDeviceGetNvLinkState(device d, u32 link, u32 *out)
{
    char b[TEXT];
    int error = lane(d, link, b);
    if (!error)
        *out = strcmp(b, "off") != 0;
    return error;
}
API nvmlDeviceGetNvLinkRemoteDeviceType(device d, u32 link, int *out)
{
    char b[TEXT];
    int error = lane(d, link, b);
    if (!error)
        *out = strcmp(b, "switch") ? 0 : 2;
    return error;
}
API nvmlDeviceGetNvLinkRemotePciInfo_v2(device d, u32 link, struct pci *out)
{
    char b[TEXT];
    int error = lane(d, link, b);
    if (!error)
        fill_pci(out, strcmp(b, "switch") ? (u32)strtoul(b, NULL, 0) : 0xf0);
    return error;
}

API nvmlDeviceGetMigMode(device d, u32 *current, u32 *pending)
{
    int error = number(d, "mig", current);
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
    out->sms = (u32)NUMBER(0, "%s.sms", name_of(d, n));
    out->mib = NUMBER(0, "%s.total", n) >> 20;
    return SUCCESS;
}
