// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//
// Maps and unmaps memory through VFIO type1, and prints the mean time of each call in nanoseconds.

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <libgen.h>
#include <linux/vfio.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ul
#define HUGE_SIZE (2ul << 20)
#define BUFFER (64ul << 20)
#define MOST 4096u

static const char usage[] =
    "usage: vfio-bench PCI-ADDRESS KIND COUNT ROUNDS\n"
    "Maps COUNT (1 to 4096) pieces of memory, with a page between neighbours, and unmaps each; repeats that\n"
    "ROUNDS times. KIND is 'page' (4 KiB), 'huge' (2 MiB) or 'random' (1 to 16 pages).\n";

static struct { uint64_t iova, size; } pieces[MOST];

static void die(const char *subject)
{
    printf("error: %s: %s\n", subject, strerror(errno));
    exit(1);
}

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000ull + time.tv_nsec;
}

static int open_vfio(const char *device)
{
    char link[128], target[256], path[64];
    snprintf(link, sizeof(link), "/sys/bus/pci/devices/%s/iommu_group", device);
    ssize_t length = readlink(link, target, sizeof(target) - 1);
    if (length < 0)
        die(link);
    target[length] = 0;
    snprintf(path, sizeof(path), "/dev/vfio/%s", basename(target));
    int container = open("/dev/vfio/vfio", O_RDWR);
    int group = open(path, O_RDWR);
    if (container < 0 || group < 0)
        die(path);
    if (ioctl(group, VFIO_GROUP_SET_CONTAINER, &container) ||
        ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU))
        die("VFIO type1");
    return container;
}

int main(int argc, char **argv)
{
    if (argc != 5) {
        fputs(usage, stderr);
        return 2;
    }
    unsigned count = strtoul(argv[3], NULL, 10), rounds = strtoul(argv[4], NULL, 10);
    if (!count || count > MOST || !rounds) {
        fputs(usage, stderr);
        return 2;
    }
    uint64_t size = !strcmp(argv[2], "huge") ? HUGE_SIZE : PAGE;
    int is_random = !strcmp(argv[2], "random");
    int container = open_vfio(argv[1]);
    unsigned char *buffer = mmap(NULL, BUFFER + HUGE_SIZE, PROT_READ | PROT_WRITE,
                                 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (buffer == MAP_FAILED)
        die("memory");
    buffer += -(uintptr_t)buffer & (HUGE_SIZE - 1);
    if (size == HUGE_SIZE)
        madvise(buffer, BUFFER, MADV_HUGEPAGE);
    memset(buffer, 1, BUFFER);

    uint64_t map_ns = 0, unmap_ns = 0, state = 88172645463325252ull;
    for (unsigned round = 0; round < rounds; round++) {
        uint64_t iova = 1ull << 32;
        for (unsigned i = 0; i < count; i++) {
            state ^= state << 13, state ^= state >> 7, state ^= state << 17;
            pieces[i].size = is_random ? PAGE * (1 + state % 16) : size;
            pieces[i].iova = iova;
            iova += pieces[i].size + size;
        }
        uint64_t start = now(), from = 0;
        for (unsigned i = 0; i < count; i++) {
            if (from + pieces[i].size > BUFFER)
                from = 0;
            struct vfio_iommu_type1_dma_map map = {
                .argsz = sizeof(map),
                .flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
                .vaddr = (uintptr_t)(buffer + from),
                .iova = pieces[i].iova,
                .size = pieces[i].size,
            };
            if (ioctl(container, VFIO_IOMMU_MAP_DMA, &map))
                die("map");
            from += pieces[i].size;
        }
        map_ns += now() - start;
        start = now();
        for (unsigned i = 0; i < count; i++) {
            struct vfio_iommu_type1_dma_unmap unmap = {
                .argsz = sizeof(unmap),
                .iova = pieces[i].iova,
                .size = pieces[i].size,
            };
            if (ioctl(container, VFIO_IOMMU_UNMAP_DMA, &unmap) || unmap.size != pieces[i].size)
                die("unmap");
        }
        unmap_ns += now() - start;
    }
    uint64_t calls = (uint64_t)count * rounds;
    printf("map %" PRIu64 " unmap %" PRIu64 "\n", map_ns / calls, unmap_ns / calls);
    return 0;
}
