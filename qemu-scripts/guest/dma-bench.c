// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//
// Runs the kernel's own benchmark of dma_map_single and dma_unmap_single, on the device that is bound to the
// benchmark's driver (dma_map_benchmark), and prints the mean time of each in nanoseconds.

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

// A copy of the structure in <linux/map_benchmark.h>, which is not installed everywhere.
struct benchmark {
    uint64_t map_100ns, map_deviation, unmap_100ns, unmap_deviation;
    uint32_t threads, seconds;
    int32_t node;
    uint32_t address_bits, direction, transfer_ns, pages;
    uint8_t reserved[76];
};
#define BENCHMARK _IOWR('d', 1, struct benchmark)

int main(int argc, char **argv)
{
    if (argc != 3) {
        fprintf(stderr, "usage: dma-bench THREADS SECONDS\n");
        return 2;
    }
    struct benchmark run = {
        .threads = strtoul(argv[1], NULL, 10),
        .seconds = strtoul(argv[2], NULL, 10),
        .node = -1,
        .address_bits = 64,
        .pages = 1,
    };
    int file = open("/sys/kernel/debug/dma_map_benchmark", O_RDWR);
    if (file < 0 || ioctl(file, BENCHMARK, &run)) {
        printf("error: dma_map_benchmark: %s\n", strerror(errno));
        return 1;
    }
    printf("map %" PRIu64 " unmap %" PRIu64 "\n", run.map_100ns * 100, run.unmap_100ns * 100);
    return 0;
}
