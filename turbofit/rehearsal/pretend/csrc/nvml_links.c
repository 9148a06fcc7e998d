/* NVML stand-in: peer access, topology, NVLink lanes. */
#include "nvml.h"

API nvmlDeviceGetP2PStatus(device a, device b, int capability, int *out)
{
    char t[TEXT];
    int status[3] = {5, 5, 5};
    CHECK(a);
    CHECK(b);
    if (capability < 0 || capability > 2)
        return NOT_SUPPORTED;
    const char *text = nvml_value(t, "p2p.%d.%d", gpu_of(a), gpu_of(b));
    if (!text)
        text = nvml_value(t, "p2p");
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
    if (!nvml_value(out, "gpu.%d.nvlink.%u", gpu_of(d), link))
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
        nvml_fill_pci(out, strcmp(b, "switch") ? (u32)strtoul(b, NULL, 0) : 0xf0);
    return error;
}
