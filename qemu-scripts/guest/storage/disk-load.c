// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//
// Reads or writes a disk at random or in order, past the page cache, with several requests at once, and prints the
// number of requests and the time.

#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <linux/fs.h>

#define MAX_DEPTH 256u

static const char usage[] =
    "usage: disk-load read|write random|sequential BYTES DEPTH MILLISECONDS DEVICE\n"
    "Requests of BYTES, DEPTH of them at once. Prints 'REQUESTS MICROSECONDS'.\n";

static void die(const char *subject)
{
    perror(subject);
    exit(1);
}

static uint64_t now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000u + (uint64_t)t.tv_nsec / 1000u;
}

static uint64_t next_random(void)
{
    static uint64_t state = 0x9e3779b97f4a7c15u;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

int main(int argc, char **argv)
{
    if (argc != 7) {
        fputs(usage, stderr);
        return 2;
    }
    int is_write = !strcmp(argv[1], "write"), is_random = !strcmp(argv[2], "random");
    size_t bytes = strtoul(argv[3], NULL, 0);
    unsigned depth = (unsigned)strtoul(argv[4], NULL, 0);
    uint64_t limit = strtoul(argv[5], NULL, 0) * 1000u, size;
    int fd = open(argv[6], O_RDWR | O_DIRECT | O_CLOEXEC);
    if (fd < 0 || ioctl(fd, BLKGETSIZE64, &size))
        die(argv[6]);
    if (!bytes || bytes > size || !depth || depth > MAX_DEPTH) {
        fputs(usage, stderr);
        return 2;
    }
    unsigned char *data = mmap(NULL, bytes * depth, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED)
        die("memory");
    memset(data, 0x5a, bytes * depth);
    aio_context_t context = 0;
    if (syscall(SYS_io_setup, depth, &context))
        die("io_setup");

    struct iocb requests[MAX_DEPTH] = { 0 }, *pointers[MAX_DEPTH];
    struct io_event events[MAX_DEPTH];
    uint64_t places = size / bytes, at = 0, done = 0, begun = now_us(), end = begun + limit;
    unsigned ready = depth, flying = 0;
    for (unsigned i = 0; i < depth; i++) {
        requests[i].aio_lio_opcode = is_write ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
        requests[i].aio_fildes = (uint32_t)fd;
        requests[i].aio_buf = (uint64_t)(uintptr_t)(data + i * bytes);
        requests[i].aio_nbytes = bytes;
        pointers[i] = &requests[i];
    }
    while (ready || flying) {
        for (unsigned i = 0; i < ready; i++)
            pointers[i]->aio_offset = (int64_t)((is_random ? next_random() : at++) % places * bytes);
        for (unsigned sent = 0; sent < ready;) {
            long n = syscall(SYS_io_submit, context, (long)(ready - sent), pointers + sent);
            if (n <= 0)
                die("io_submit");
            sent += (unsigned)n;
        }
        flying += ready;
        long n = syscall(SYS_io_getevents, context, 1L, (long)flying, events, NULL);
        if (n <= 0)
            die("io_getevents");
        for (long i = 0; i < n; i++) {
            if (events[i].res != (int64_t)bytes) {
                fprintf(stderr, "a request ended with %lld\n", (long long)events[i].res);
                return 1;
            }
            pointers[i] = (struct iocb *)(uintptr_t)events[i].obj;
        }
        flying -= (unsigned)n;
        done += (uint64_t)n;
        ready = now_us() < end ? (unsigned)n : 0;
    }
    printf("%llu %llu\n", (unsigned long long)done, (unsigned long long)(now_us() - begun));
    return 0;
}
