/* Stand-in for libnvidia-ml.so.1: one thing for pretend machines, where it answers from the account
 * of all processes, and for tests of programs that use NVML, where it plays a script; nvml_values.c
 * has both. Here: the library, handles and what a device is; nvml_memory.c has memory, processes
 * and MIG, nvml_links.c peers and NVLink. */
#include "nvml.h"

/* The prefix of a device's keys: "gpu.0" or "gpu.0.mig.1". */
const char *nvml_name(device d, char out[64])
{
    if (is_mig(d))
        snprintf(out, 64, "gpu.%d.mig.%d", gpu_of(d), part_of(d));
    else
        snprintf(out, 64, "gpu.%d", gpu_of(d));
    return out;
}

int nvml_copy(char *to, u32 size, const char *text)
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
API nvmlInit(void) { return nvmlInitWithFlags(0); }
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
    return nvml_copy(out, size, nvml_value(b, "driver"));
}
API nvmlSystemGetNVMLVersion(char *out, u32 size) { return nvml_copy(out, size, "12.570.00"); }
API nvmlSystemGetCudaDriverVersion_v2(int *out)
{
    *out = (int)NUMBER(12080, "cuda");
    return SUCCESS;
}
API nvmlSystemGetCudaDriverVersion(int *out) { return nvmlSystemGetCudaDriverVersion_v2(out); }

API nvmlSystemGetProcessName(u32 pid, char *out, u32 size)
{
    char b[TEXT];
    const char *text = nvml_value(b, "process.%u", pid);
    return text ? nvml_copy(out, size, text) : NOT_FOUND;
}

API nvmlDeviceGetCount_v2(u32 *out)
{
    *out = (u32)NUMBER(0, "gpus");
    return SUCCESS;
}
API nvmlDeviceGetCount(u32 *out) { return nvmlDeviceGetCount_v2(out); }
API nvmlDeviceGetHandleByIndex_v2(u32 index, device *out)
{
    if (index >= NUMBER(0, "gpus"))
        return INVALID_ARGUMENT;
    if (HAS("gpu.%u.no_handle", index))
        return (int)NUMBER(GPU_IS_LOST, "gpu.%u.no_handle", index);
    *out = (device)(size_t)(1 + index);
    return SUCCESS;
}
API nvmlDeviceGetHandleByIndex(u32 index, device *out) { return nvmlDeviceGetHandleByIndex_v2(index, out); }
API nvmlDeviceGetHandleByUUID(const char *uuid, device *out)
{
    char b[TEXT];
    for (u32 i = 0; i < NUMBER(0, "gpus"); i++) {
        const char *text = nvml_value(b, "gpu.%u.uuid", i);
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
    return nvml_copy(out, size, nvml_value(b, "%s.name", nvml_name(d, n)));
}
API nvmlDeviceGetUUID(device d, char *out, u32 size)
{
    char b[TEXT], n[64];
    return nvml_copy(out, size, nvml_value(b, "%s.uuid", nvml_name(d, n)));
}

void nvml_fill_pci(struct pci *out, u32 bus)
{
    memset(out, 0, sizeof *out);
    out->bus = bus;
    snprintf(out->text, sizeof out->text, "00000000:%02X:00.0", bus);
    snprintf(out->legacy, sizeof out->legacy, "0000:%02X:00.0", bus);
}

API nvmlDeviceGetPciInfo_v3(device d, struct pci *out)
{
    CHECK(d);
    nvml_fill_pci(out, (u32)NUMBER(gpu_of(d) + 1, "gpu.%d.bus", gpu_of(d)));
    return SUCCESS;
}

/* "00000000:01:00.0", "0000:01:00.0" and "01:00.0" are the same. */
API nvmlDeviceGetHandleByPciBusId_v2(const char *text, device *out)
{
    u32 domain = 0, bus = 0;
    int behind = 0; /* set where the second colon is there: "01:00.0" has no domain */
    if (sscanf(text, "%x:%x:%n", &domain, &bus, &behind) != 2 || !behind) {
        domain = 0;
        if (sscanf(text, "%x:", &bus) != 1)
            return INVALID_ARGUMENT;
    }
    for (u32 i = 0; !domain && i < NUMBER(0, "gpus"); i++) {
        if (NUMBER(i + 1, "gpu.%u.bus", i) == bus) {
            *out = (device)(size_t)(1 + i);
            return SUCCESS;
        }
    }
    return NOT_FOUND;
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
int nvml_number(device d, const char *key, u32 *out)
{
    char n[64];
    CHECK(d);
    if (!HAS("%s.%s", nvml_name(d, n), key))
        return NOT_SUPPORTED;
    *out = (u32)NUMBER(0, "%s.%s", n, key);
    return SUCCESS;
}
API nvmlDeviceGetNumGpuCores(device d, u32 *out) { return nvml_number(d, "cores", out); }
API nvmlDeviceGetMaxPcieLinkGeneration(device d, u32 *out) { return nvml_number(d, "pcie_generation", out); }
API nvmlDeviceGetMaxPcieLinkWidth(device d, u32 *out) { return nvml_number(d, "pcie_width", out); }

API nvmlDeviceGetGpuInstanceId(device d, u32 *out) { return nvml_number(d, "gi", out); }
API nvmlDeviceGetComputeInstanceId(device d, u32 *out) { return nvml_number(d, "ci", out); }

/* What neither machine has: speed, power, load, errors. */
#define NOTHING(name) \
    API name(void) { return NOT_SUPPORTED; }
NOTHING(nvmlDeviceGetCurrPcieLinkGeneration)
NOTHING(nvmlDeviceGetCurrPcieLinkWidth)
NOTHING(nvmlDeviceGetPerformanceState)
NOTHING(nvmlDeviceGetPersistenceMode)
NOTHING(nvmlDeviceGetTemperature)
NOTHING(nvmlDeviceGetEccMode)
NOTHING(nvmlDeviceGetTotalEccErrors)
NOTHING(nvmlDeviceGetRemappedRows)
NOTHING(nvmlDeviceGetCurrentClocksEventReasons)
NOTHING(nvmlDeviceGetCurrentClocksThrottleReasons)
NOTHING(nvmlDeviceGetUtilizationRates)
NOTHING(nvmlDeviceGetPowerUsage)
NOTHING(nvmlDeviceGetEnforcedPowerLimit)
NOTHING(nvmlDeviceGetPowerManagementLimit)
NOTHING(nvmlDeviceGetTotalEnergyConsumption)
NOTHING(nvmlDeviceGetFanSpeed)
NOTHING(nvmlDeviceGetClockInfo)
NOTHING(nvmlDeviceGetMaxClockInfo)
NOTHING(nvmlDeviceGetEncoderUtilization)
NOTHING(nvmlDeviceGetDecoderUtilization)
NOTHING(nvmlDeviceGetPcieThroughput)
NOTHING(nvmlDeviceGetProcessUtilization)
