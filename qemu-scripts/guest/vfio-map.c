// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//
// Makes and removes DMA mappings through VFIO type1, at random, and prints those that are left.
//
// The stock virtio-iommu driver turns every mapping into MAP and UNMAP requests. All choices come
// from one seed. `dump` prints the mappings that the program has: pages of a buffer
// (with the guest-physical address of each) and ranges of IOVAs that point into it.

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <libgen.h>
#include <linux/vfio.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

// All sizes are in pages of the guest, which have 4, 16 or 64 KiB.
#define PAGE page_bytes
#define LARGE_BYTES (2u << 20)   // the daemon's next larger page
#define MAX_PAGES 512u           // of a mapping: 2 MiB, if a page has 4 KiB
#define WINDOW_PAGES 4096u       // IOVAs are drawn from windows of 16 MiB and more,
#define MAX_WINDOWS 40u          // so that neighbours, holes and shared tables are common
#define MAX_RANGES 64u
#define MAX_LIVE 8192u
#define MAX_EXTRA 64u
#define SCATTERED_PAGES 2048u    // touched in random order: physically scattered
#define SEQUENTIAL_PAGES 1024u   // touched in order: runs of a few pages
#define HUGE_PART_PAGES 2048u    // transparent huge pages, if the kernel gives them
#define BUFFER_PAGES (SCATTERED_PAGES + SEQUENTIAL_PAGES + HUGE_PART_PAGES)

struct window {
    uint64_t first;
    uint16_t owner[WINDOW_PAGES]; // 1 + slot of the mapping that covers the page, 0: free
};

struct mapping {
    uint32_t window, page, pages; // the window, and the pages in it
    uint32_t source;              // first page in the buffer
    uint32_t flags;
    uint32_t place;               // index in `live`
};

static const char usage[] =
    "usage: vfio-map [--seed N] [--live N] PCI-ADDRESS...\n"
    "Puts the groups of the devices (bound to vfio-pci) into one container and reads commands from\n"
    "standard input. Each answer ends with a line that starts with 'ok' or 'error'.\n"
    "  churn N          map N random ranges, unmapping others meanwhile (about --live stay)\n"
    "  dump             print 'p BYTES' for the size of a page, 'b INDEX GPA' for buffer pages in use and\n"
    "                   'm IOVA PAGES ACCESS INDEX'\n"
    "  one              map one page, print 'm ...' for it\n"
    "  hot FIRST LAST   find a page with a guest-physical address in FIRST..=LAST, map it\n"
    "  ranges           print the IOVA ranges that VFIO offers\n"
    "  clear            unmap everything\n"
    "  quit             leave; the kernel removes what is mapped\n"
    "All numbers that are addresses are hexadecimal without 0x.\n";

static unsigned long page_bytes;
static uint64_t random_state;
static int container = -1;
static int groups[32];
static int group_count;
static struct vfio_iova_range ranges[MAX_RANGES];
static unsigned range_count;
static struct window windows[MAX_WINDOWS];
static unsigned window_count;
static struct mapping slots[MAX_LIVE];
static uint16_t live[MAX_LIVE], spare[MAX_LIVE];
static unsigned live_count, spare_count, live_target = 3000;
static unsigned char *buffer;
static unsigned char *extra[MAX_EXTRA];
static unsigned extra_count;

static void die(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    printf("error ");
    vprintf(format, args);
    printf(" (errno %d, %s)\n", errno, strerror(errno));
    va_end(args);
    fflush(stdout);
    exit(1);
}

// splitmix64
static uint64_t next_random(void)
{
    uint64_t z = (random_state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

static uint32_t below(uint32_t bound)
{
    return (uint32_t)(next_random() % bound);
}

static unsigned char *page_address(uint32_t index)
{
    return index < BUFFER_PAGES ? buffer + index * PAGE : extra[index - BUFFER_PAGES];
}

static uint64_t gpa_of(int pagemap, const void *address)
{
    uint64_t entry = 0;
    uint64_t at = (uint64_t)(uintptr_t)address / PAGE * sizeof(entry);
    if (pread(pagemap, &entry, sizeof(entry), (off_t)at) != (ssize_t)sizeof(entry))
        die("cannot read /proc/self/pagemap");
    if (!(entry >> 63))
        return UINT64_MAX;
    return (entry & ((1ull << 55) - 1)) * PAGE;
}

static int open_pagemap(void)
{
    int fd = open("/proc/self/pagemap", O_RDONLY);
    if (fd < 0)
        die("cannot open /proc/self/pagemap");
    return fd;
}

static void make_buffer(void)
{
    size_t slack = LARGE_BYTES;
    unsigned char *at = mmap(NULL, BUFFER_PAGES * PAGE + slack, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED)
        die("no memory for the buffer");
    at = (unsigned char *)(((uintptr_t)at + slack - 1) & ~(uintptr_t)(slack - 1));
    buffer = at;
    size_t small = SCATTERED_PAGES + SEQUENTIAL_PAGES;
    madvise(at, small * PAGE, MADV_NOHUGEPAGE);
    madvise(at + small * PAGE, HUGE_PART_PAGES * PAGE, MADV_HUGEPAGE);
    static uint32_t order[SCATTERED_PAGES];
    for (uint32_t i = 0; i < SCATTERED_PAGES; i++) {
        uint32_t j = below(i + 1);
        order[i] = order[j];
        order[j] = i;
    }
    for (uint32_t i = 0; i < SCATTERED_PAGES; i++)
        at[order[i] * PAGE] = 1;
    for (uint32_t i = SCATTERED_PAGES; i < BUFFER_PAGES; i++)
        at[i * PAGE] = 1;
}

static int group_number(const char *device)
{
    char link[128], target[256];
    snprintf(link, sizeof(link), "/sys/bus/pci/devices/%s/iommu_group", device);
    ssize_t length = readlink(link, target, sizeof(target) - 1);
    if (length < 0)
        die("%s has no IOMMU group", device);
    target[length] = 0;
    return atoi(basename(target));
}

static void open_vfio(char **devices, int count)
{
    container = open("/dev/vfio/vfio", O_RDWR);
    if (container < 0)
        die("cannot open /dev/vfio/vfio");
    if (!ioctl(container, VFIO_CHECK_EXTENSION, VFIO_TYPE1v2_IOMMU))
        die("no type1v2");
    int seen[32];
    for (int i = 0; i < count; i++) {
        int number = group_number(devices[i]), known = 0;
        for (int j = 0; j < group_count; j++)
            known |= seen[j] == number;
        if (known)
            continue;
        if (group_count == 32)
            die("too many groups");
        char path[64];
        snprintf(path, sizeof(path), "/dev/vfio/%d", number);
        int group = open(path, O_RDWR);
        if (group < 0)
            die("cannot open %s", path);
        struct vfio_group_status status = { .argsz = sizeof(status) };
        if (ioctl(group, VFIO_GROUP_GET_STATUS, &status) || !(status.flags & VFIO_GROUP_FLAGS_VIABLE))
            die("group %d is not viable", number);
        if (ioctl(group, VFIO_GROUP_SET_CONTAINER, &container))
            die("cannot put group %d into the container", number);
        seen[group_count] = number;
        groups[group_count++] = group;
        if (group_count == 1 && ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU))
            die("cannot choose type1v2");
    }
}

/* The kernel's part (detaching, with interrupts off) is over when this returns. */
static void close_vfio(void)
{
    while (group_count)
        close(groups[--group_count]);
    close(container);
}

static void read_ranges(void)
{
    static unsigned char space[8192] __attribute__((aligned(8)));
    struct vfio_iommu_type1_info *info = (void *)space;
    info->argsz = sizeof(space);
    if (ioctl(container, VFIO_IOMMU_GET_INFO, info))
        die("VFIO_IOMMU_GET_INFO");
    if (!(info->flags & VFIO_IOMMU_INFO_CAPS) || info->argsz > sizeof(space))
        die("VFIO reports no capabilities");
    for (uint32_t at = info->cap_offset; at;) {
        struct vfio_info_cap_header *header = (void *)(space + at);
        if (header->id == VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE) {
            struct vfio_iommu_type1_info_cap_iova_range *cap = (void *)header;
            for (uint32_t i = 0; i < cap->nr_iovas && range_count < MAX_RANGES; i++)
                ranges[range_count++] = cap->iova_ranges[i];
        }
        at = header->next;
    }
    if (!range_count)
        die("VFIO reports no IOVA ranges");
}

static void add_window(uint64_t first)
{
    uint64_t last = first + WINDOW_PAGES * PAGE - 1;
    if (first % PAGE || last < first || window_count == MAX_WINDOWS)
        return;
    // type1 of older kernels miscalculates at the very end of a 64-bit space.
    if (last > UINT64_MAX - 16 * PAGE)
        return;
    int inside = 0;
    for (unsigned i = 0; i < range_count; i++)
        inside |= first >= ranges[i].start && last <= ranges[i].end;
    for (unsigned i = 0; i < window_count; i++)
        inside &= last < windows[i].first || first > windows[i].first + WINDOW_PAGES * PAGE - 1;
    if (inside)
        windows[window_count++].first = first;
}

// Places windows at both ends of every range, where reserved regions begin, and at random.
static void make_windows(void)
{
    const uint64_t size = WINDOW_PAGES * PAGE;
    for (unsigned i = 0; i < range_count && i < MAX_WINDOWS / 3; i++) {
        uint64_t first = (ranges[i].start + PAGE - 1) & ~(PAGE - 1);
        uint64_t last = ranges[i].end;
        add_window(first);
        if (last - first >= size)
            add_window(((last - size) & ~(PAGE - 1)) + ((last % PAGE == PAGE - 1) ? PAGE : 0));
    }
    for (unsigned tries = 0; tries < 1000 && window_count < MAX_WINDOWS; tries++) {
        struct vfio_iova_range *range = &ranges[below(range_count)];
        uint64_t length = range->end - range->start;
        // Every magnitude is equally likely, so that low addresses occur as well as high ones.
        unsigned bits = 24 + below(40);
        uint64_t offset = next_random() & ((1ull << bits) - 1);
        if (length < size || offset > length - size)
            continue;
        add_window((range->start + offset) & ~(PAGE - 1));
    }
    if (!window_count)
        die("no room for a window of %u pages", WINDOW_PAGES);
}

static uint64_t iova_of(const struct mapping *mapping)
{
    return windows[mapping->window].first + mapping->page * PAGE;
}

static void map(uint32_t window, uint32_t page, uint32_t pages, uint32_t source, uint32_t flags)
{
    if (!spare_count)
        die("out of slots");
    struct vfio_iommu_type1_dma_map request = {
        .argsz = sizeof(request),
        .flags = flags,
        .vaddr = (uintptr_t)page_address(source),
        .iova = windows[window].first + page * PAGE,
        .size = pages * PAGE,
    };
    if (ioctl(container, VFIO_IOMMU_MAP_DMA, &request))
        die("map of %u pages at %" PRIx64 ", flags %u", pages, (uint64_t)request.iova, flags);
    uint16_t slot = spare[--spare_count];
    slots[slot] = (struct mapping){ window, page, pages, source, flags, live_count };
    live[live_count++] = slot;
    for (uint32_t i = 0; i < pages; i++)
        windows[window].owner[page + i] = (uint16_t)(slot + 1);
}

static void forget(uint16_t slot)
{
    struct mapping *mapping = &slots[slot];
    memset(&windows[mapping->window].owner[mapping->page], 0, mapping->pages * sizeof(uint16_t));
    uint16_t moved = live[--live_count];
    live[mapping->place] = moved;
    slots[moved].place = mapping->place;
    spare[spare_count++] = slot;
}

static void unmap(uint64_t iova, uint64_t size, uint64_t expected)
{
    struct vfio_iommu_type1_dma_unmap request = {
        .argsz = sizeof(request),
        .iova = iova,
        .size = size,
    };
    if (ioctl(container, VFIO_IOMMU_UNMAP_DMA, &request))
        die("unmap at %" PRIx64 ", size %" PRIx64, iova, size);
    if (request.size != expected) {
        errno = 0;
        die("unmap at %" PRIx64 ", size %" PRIx64 ": removed %" PRIx64 ", expected %" PRIx64, iova,
            size, (uint64_t)request.size, expected);
    }
}

static uint32_t random_pages(void)
{
    uint32_t kind = below(1000);
    if (kind < 600)
        return 1;
    if (kind < 880)
        return 2 + below(7);
    if (kind < 980)
        return 9 + below(24);
    if (kind < 995)
        return 33 + below(224);
    return MAX_PAGES - (kind & 1) * below(MAX_PAGES / 2);
}

static uint32_t random_flags(void)
{
    switch (below(4)) {
    case 0:
        return VFIO_DMA_MAP_FLAG_READ;
    case 1:
        return VFIO_DMA_MAP_FLAG_WRITE;
    default:
        return VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;
    }
}

static int is_free(uint32_t window, uint32_t page, uint32_t pages)
{
    if (page + pages > WINDOW_PAGES)
        return 0;
    for (uint32_t i = 0; i < pages; i++)
        if (windows[window].owner[page + i])
            return 0;
    return 1;
}

static void map_random(void)
{
    const uint32_t large = LARGE_BYTES / PAGE;
    for (unsigned tries = 0; tries < 10000; tries++) {
        uint32_t pages = random_pages();
        uint32_t window = below(window_count);
        uint32_t page = below(WINDOW_PAGES);
        uint32_t style = below(8);
        if (style < 2 && live_count) { // right behind another mapping
            struct mapping *other = &slots[live[below(live_count)]];
            window = other->window;
            page = other->page + other->pages;
        } else if (style < 4) { // at a 2 MiB boundary, for large pages
            uint64_t first = windows[window].first / PAGE;
            page = (uint32_t)(-first & (large - 1)) + below(WINDOW_PAGES / large) * large;
        }
        if (!is_free(window, page, pages))
            continue;
        uint32_t source;
        if (pages > 32 || below(4) == 0) {
            source = SCATTERED_PAGES + SEQUENTIAL_PAGES;
            if (pages >= MAX_PAGES / 2)
                source += below(HUGE_PART_PAGES / MAX_PAGES) * MAX_PAGES;
            else if (below(2))
                source += below(HUGE_PART_PAGES - pages);
            else
                source -= SEQUENTIAL_PAGES - below(SEQUENTIAL_PAGES - pages);
        } else {
            source = below(SCATTERED_PAGES - pages);
        }
        map(window, page, pages, source, random_flags());
        return;
    }
    die("no free IOVA found");
}

// Unmaps one mapping, or now and then all mappings of a range, gaps included.
static unsigned unmap_random(void)
{
    struct mapping *start = &slots[live[below(live_count)]];
    struct window *window = &windows[start->window];
    uint32_t first = start->page, end = first + start->pages, bytes_pages = start->pages;
    uint16_t found[16];
    unsigned count = 0;
    found[count++] = (uint16_t)(start - slots);
    if (below(16) == 0) {
        unsigned wanted = 2 + below(14);
        for (uint32_t page = end; page < WINDOW_PAGES && page < end + 64 && count < wanted;) {
            if (!window->owner[page]) {
                page++;
                continue;
            }
            uint16_t slot = (uint16_t)(window->owner[page] - 1);
            found[count++] = slot;
            bytes_pages += slots[slot].pages;
            end = page = slots[slot].page + slots[slot].pages;
        }
    }
    unmap(window->first + first * PAGE, (end - first) * PAGE, bytes_pages * PAGE);
    for (unsigned i = 0; i < count; i++)
        forget(found[i]);
    return count;
}

static void churn(unsigned long wanted)
{
    unsigned long maps = 0, unmaps = 0;
    struct timespec from, to;
    clock_gettime(CLOCK_MONOTONIC, &from);
    while (maps < wanted) {
        int full = live_count >= live_target + live_target / 4;
        int thin = live_count < live_target;
        if (thin || (!full && below(2))) {
            map_random();
            maps++;
        } else {
            unmaps += unmap_random();
        }
    }
    clock_gettime(CLOCK_MONOTONIC, &to);
    long ms = (to.tv_sec - from.tv_sec) * 1000 + (to.tv_nsec - from.tv_nsec) / 1000000;
    printf("ok %lu maps %lu unmaps %u live %ld ms\n", maps, unmaps, live_count, ms);
}

static void print_mapping(const struct mapping *mapping)
{
    const char *access = mapping->flags == VFIO_DMA_MAP_FLAG_READ    ? "r-"
                         : mapping->flags == VFIO_DMA_MAP_FLAG_WRITE ? "-w"
                                                                     : "rw";
    printf("m %" PRIx64 " %u %s %u\n", iova_of(mapping), mapping->pages, access, mapping->source);
}

static void dump(void)
{
    static unsigned char used[BUFFER_PAGES + MAX_EXTRA];
    memset(used, 0, sizeof(used));
    for (unsigned i = 0; i < live_count; i++)
        memset(&used[slots[live[i]].source], 1, slots[live[i]].pages);
    printf("p %lu\n", PAGE);
    int pagemap = open_pagemap();
    for (uint32_t i = 0; i < BUFFER_PAGES + extra_count; i++)
        if (used[i])
            printf("b %u %" PRIx64 "\n", i, gpa_of(pagemap, page_address(i)));
    close(pagemap);
    for (unsigned i = 0; i < live_count; i++)
        print_mapping(&slots[live[i]]);
    printf("ok %u mappings\n", live_count);
}

static void map_single(uint32_t source)
{
    for (unsigned tries = 0; tries < 100000; tries++) {
        uint32_t window = below(window_count), page = below(WINDOW_PAGES);
        if (!is_free(window, page, 1))
            continue;
        map(window, page, 1, source, VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE);
        printf("p %lu\n", PAGE);
        int pagemap = open_pagemap();
        printf("b %u %" PRIx64 "\n", source, gpa_of(pagemap, page_address(source)));
        close(pagemap);
        print_mapping(&slots[live[live_count - 1]]);
        return;
    }
    die("no free IOVA found");
}

// Allocates memory until a page of it lies in first..=last; frees all other pages.
static void hot(uint64_t first, uint64_t last)
{
    enum { CHUNKS = 4096, CHUNK = 1 << 20 };
    static unsigned char *taken[CHUNKS];
    unsigned count = 0;
    unsigned char *found = NULL;
    if (extra_count == MAX_EXTRA) {
        printf("error too many pages were asked for\n");
        return;
    }
    int pagemap = open_pagemap();
    while (!found && count < CHUNKS) {
        unsigned char *at = mmap(NULL, CHUNK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (at == MAP_FAILED)
            break;
        madvise(at, CHUNK, MADV_NOHUGEPAGE);
        taken[count++] = at;
        for (unsigned char *page = at; page < at + CHUNK && !found; page += PAGE) {
            *page = 1;
            uint64_t gpa = gpa_of(pagemap, page);
            if (gpa >= first && gpa <= last)
                found = page;
        }
    }
    close(pagemap);
    if (found) {
        extra[extra_count] = found;
        map_single(BUFFER_PAGES + extra_count++);
    }
    for (unsigned i = 0; i < count; i++)
        if (!found || found < taken[i] || found >= taken[i] + CHUNK)
            munmap(taken[i], CHUNK);
    printf(found ? "ok\n" : "error the kernel gave no page in that range\n");
}

static void clear(void)
{
    unsigned count = live_count;
    while (live_count) {
        struct mapping *mapping = &slots[live[live_count - 1]];
        unmap(iova_of(mapping), mapping->pages * PAGE, mapping->pages * PAGE);
        forget(live[live_count - 1]);
    }
    printf("ok %u unmapped\n", count);
}

static void run_commands(void)
{
    char line[256];
    while (fgets(line, sizeof(line), stdin)) {
        char word[16] = "";
        uint64_t a = 0, b = 0;
        int count = sscanf(line, "%15s %" SCNx64 " %" SCNx64, word, &a, &b);
        if (count >= 2 && !strcmp(word, "churn")) {
            churn(strtoul(line + strlen("churn"), NULL, 10));
        } else if (!strcmp(word, "dump")) {
            dump();
        } else if (!strcmp(word, "one")) {
            map_single(below(BUFFER_PAGES));
            printf("ok\n");
        } else if (count == 3 && !strcmp(word, "hot")) {
            hot(a, b);
        } else if (!strcmp(word, "ranges")) {
            for (unsigned i = 0; i < range_count; i++)
                printf("r %llx %llx\n", ranges[i].start, ranges[i].end);
            printf("ok %u ranges\n", range_count);
        } else if (!strcmp(word, "clear")) {
            clear();
        } else if (!strcmp(word, "quit")) {
            close_vfio();
            printf("ok\n");
            fflush(stdout);
            return;
        } else {
            printf("error unknown command: %s\n", word);
        }
        fflush(stdout);
    }
}

int main(int argc, char **argv)
{
    page_bytes = (unsigned long)sysconf(_SC_PAGESIZE);
    int at = 1;
    for (; at + 1 < argc && argv[at][0] == '-'; at += 2) {
        if (!strcmp(argv[at], "--seed"))
            random_state = strtoull(argv[at + 1], NULL, 0);
        else if (!strcmp(argv[at], "--live"))
            live_target = (unsigned)strtoul(argv[at + 1], NULL, 0);
        else
            break;
    }
    if (at >= argc || argv[at][0] == '-' || !live_target || live_target > MAX_LIVE / 2) {
        fputs(usage, stderr);
        return 2;
    }
    for (unsigned i = 0; i < MAX_LIVE; i++)
        spare[spare_count++] = (uint16_t)i;
    make_buffer();
    open_vfio(argv + at, argc - at);
    read_ranges();
    make_windows();
    printf("ok %u windows\n", window_count);
    fflush(stdout);
    run_commands();
    return 0;
}
