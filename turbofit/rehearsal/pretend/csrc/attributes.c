/* What a card says of itself; cudaDeviceAttr and CUdevice_attribute have the same numbers. */
#include "account.h"

int pretend_attribute(int *value, int attribute, int device)
{
    const struct pretend_device *from = pretend_device(device);
    if (!from)
        return PRETEND_INVALID;
    switch (attribute) {
    case 1: *value = 1024; break;                /* threads per block */
    case 2: case 3: *value = 1024; break;        /* block, x and y */
    case 4: *value = 64; break;                  /* block, z */
    case 5: *value = 0x7fffffff; break;          /* grid, x: 0 would make CUB launch for ever */
    case 6: case 7: *value = 65535; break;       /* grid, y and z */
    case 8: *value = 48 << 10; break;            /* shared memory per block */
    case 10: *value = 32; break;                 /* warp */
    case 9: *value = 65536; break;               /* constant memory */
    case 12: *value = 65536; break;              /* registers per block */
    case 13: *value = 1500000; break;            /* clock, kHz */
    case 16: *value = from->sm_count; break;
    case 36: *value = 9000000; break;            /* memory clock, kHz */
    case 37: *value = 384; break;                /* bus width */
    case 38: *value = (int)from->l2; break;
    case 39: *value = 1536; break;               /* threads per multiprocessor */
    case 41: *value = 1; break;                  /* unified addressing */
    case 75: *value = from->major; break;
    case 76: *value = from->minor; break;
    case 81: *value = (int)from->smem_sm; break;
    case 82: *value = 65536; break;              /* registers per multiprocessor */
    case 95: *value = 1; break;                  /* cooperative launch */
    case 97: *value = (int)from->smem_block; break;
    case 102: *value = 1; break;                 /* virtual memory management */
    case 106: *value = 16; break;                /* blocks per multiprocessor */
    case 115: *value = 1; break;                 /* memory pools */
    default: *value = 0;
    }
    return PRETEND_OK;
}
