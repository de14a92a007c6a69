// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//
// Makes an `edu` device copy pages of a buffer through VFIO type1, at IOVAs from standard input, and prints the pages
// that have changed.
//
// The program compares every page byte by byte with its contents before the copy: a DMA to a wrong place shows as a
// change of a page that the command did not name.

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <libgen.h>
#include <linux/vfio.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#ifdef __x86_64__
#include <cpuid.h>
#endif

#define PAGE 4096ul
#define PAGES 64u           // of the buffer
#define MAX_MAPPINGS 64u
#define EDU_ID 0x010000edu  // register 0 of revision 1.0
#define EDU_BUFFER 0x40000u // the device's own memory, one page
#define FREE_REGISTERS 0x1000 // from here on they are all ones, and writes do nothing
#define MAX_REGISTERS 8192u
#define DMA_LIMIT 30        // seconds
#define IRQ_LIMIT 20000     // milliseconds

struct mapping {
    uint64_t iova;
    unsigned pages, index;
    uint32_t flags;
};

static const char usage[] =
    "usage: vfio-edu PCI-ADDRESS\n"
    "Opens the device (an edu, bound to vfio-pci) and reads commands from standard input. Each answer ends with\n"
    "a line that starts with 'ok' or 'error'. The buffer has 64 pages of distinct contents.\n"
    "  map IOVA PAGES ACCESS INDEX   map pages of the buffer from INDEX on; ACCESS is r-, -w or rw\n"
    "  unmap IOVA PAGES              unmap exactly that\n"
    "  copy FROM TO                  the device reads the page at IOVA FROM and writes it at IOVA TO. Prints for\n"
    "                                each page of the buffer that has changed 'c INDEX SOURCE': SOURCE is the\n"
    "                                page that has these bytes now, 'zeros' or 'other'\n"
    "  irq KIND COUNT                the device raises COUNT interrupts, 'intx' or 'msi', in each of two ways: at the\n"
    "                                end of a factorial, and at the end of a DMA into its own memory\n"
    "  registers COUNT               read and write COUNT registers of 8 bytes that do nothing, and print\n"
    "                                'n READ WRITE': nanoseconds for each\n"
    "  dump                          print 'b INDEX GPA' for pages that are mapped and 'm IOVA PAGES ACCESS INDEX'\n"
    "  where INDEX                   print 'b INDEX GPA'\n"
    "  quit                          leave; the kernel removes what is mapped\n"
    "Addresses are hexadecimal without 0x, PAGES and INDEX decimal.\n";

static int container = -1, group = -1, device = -1;
static struct vfio_region_info config_space, registers;
static unsigned char *buffer, before[PAGES * PAGE];
static struct mapping mappings[MAX_MAPPINGS];
static unsigned mapping_count;

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

static void fill_page(unsigned index)
{
    uint64_t z = 0x9e3779b97f4a7c15ull * (index + 1);
    for (unsigned i = 0; i < PAGE / sizeof(z); i++) {
        z ^= z << 13;
        z ^= z >> 7;
        z ^= z << 17;
        memcpy(buffer + index * PAGE + i * sizeof(z), &z, sizeof(z));
    }
}

static void make_buffer(void)
{
    buffer = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (buffer == MAP_FAILED)
        die("no memory for the buffer");
    // A page that the kernel moves would look like the result of a DMA.
    if (mlock(buffer, PAGES * PAGE))
        die("cannot lock the buffer");
    for (unsigned i = 0; i < PAGES; i++)
        fill_page(i);
}

static void open_vfio(const char *name)
{
    char path[128], target[256];
    snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/iommu_group", name);
    ssize_t length = readlink(path, target, sizeof(target) - 1);
    if (length < 0)
        die("%s has no IOMMU group", name);
    target[length] = 0;
    snprintf(path, sizeof(path), "/dev/vfio/%s", basename(target));
    container = open("/dev/vfio/vfio", O_RDWR);
    if (container < 0)
        die("cannot open /dev/vfio/vfio");
    group = open(path, O_RDWR);
    if (group < 0)
        die("cannot open %s", path);
    if (ioctl(group, VFIO_GROUP_SET_CONTAINER, &container))
        die("cannot put %s into a container", path);
    if (ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU))
        die("cannot choose type1v2");
    device = ioctl(group, VFIO_GROUP_GET_DEVICE_FD, name);
    if (device < 0)
        die("cannot open %s", name);
}

static struct vfio_region_info region(unsigned index)
{
    struct vfio_region_info info = { .argsz = sizeof(info), .index = index };
    if (ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &info))
        die("region %u", index);
    return info;
}

// Leaves the guest once, before an access to a register that the VMM may trap. Under KVM on a processor that QEMU
// emulates, an access fails right after a page fault: until the guest's next exit, that processor reports the page fault
// as still being delivered, and KVM cannot emulate an access then. After this exit, the kernel makes the access (pread or
// pwrite), so that no page fault comes between.
static void leave_guest(void)
{
#ifdef __x86_64__
    unsigned a, b, c, d;
    __cpuid(0, a, b, c, d);
#endif
}

static uint32_t load32(unsigned at)
{
    uint32_t value;
    leave_guest();
    if (pread(device, &value, sizeof(value), (off_t)(registers.offset + at)) != sizeof(value))
        die("cannot read register %x", at);
    return value;
}

static void store(unsigned at, const void *value, size_t size)
{
    leave_guest();
    if (pwrite(device, value, size, (off_t)(registers.offset + at)) != (ssize_t)size)
        die("cannot write register %x", at);
}

static void store32(unsigned at, uint32_t value)
{
    store(at, &value, sizeof(value));
}

static void store64(unsigned at, uint64_t value)
{
    store(at, &value, sizeof(value));
}

static void open_device(void)
{
    config_space = region(VFIO_PCI_CONFIG_REGION_INDEX);
    uint16_t command;
    off_t at = (off_t)config_space.offset + 4;
    if (pread(device, &command, sizeof(command), at) != sizeof(command))
        die("cannot read the command register");
    command |= 1 << 1 | 1 << 2; // memory space, bus master
    if (pwrite(device, &command, sizeof(command), at) != sizeof(command))
        die("cannot write the command register");
    registers = region(VFIO_PCI_BAR0_REGION_INDEX);
    errno = 0;
    if (load32(0) != EDU_ID)
        die("register 0 is %08x: the device is no edu", load32(0));
}

/* The kernel's part (detaching, with interrupts off) is over when this returns. */
static void close_vfio(void)
{
    close(device);
    close(group);
    close(container);
}

static void map(uint64_t iova, unsigned pages, const char *access, unsigned index)
{
    uint32_t flags = (strchr(access, 'r') ? VFIO_DMA_MAP_FLAG_READ : 0) |
                     (strchr(access, 'w') ? VFIO_DMA_MAP_FLAG_WRITE : 0);
    struct vfio_iommu_type1_dma_map request = {
        .argsz = sizeof(request),
        .flags = flags,
        .vaddr = (uintptr_t)(buffer + index * PAGE),
        .iova = iova,
        .size = pages * PAGE,
    };
    if (mapping_count == MAX_MAPPINGS || index >= PAGES || pages > PAGES - index) {
        printf("error no room for this mapping\n");
    } else if (ioctl(container, VFIO_IOMMU_MAP_DMA, &request)) {
        printf("error map: %s\n", strerror(errno));
    } else {
        mappings[mapping_count++] = (struct mapping){ iova, pages, index, flags };
        printf("ok\n");
    }
}

static void unmap(uint64_t iova, unsigned pages)
{
    struct vfio_iommu_type1_dma_unmap request = {
        .argsz = sizeof(request),
        .iova = iova,
        .size = pages * PAGE,
    };
    if (ioctl(container, VFIO_IOMMU_UNMAP_DMA, &request)) {
        printf("error unmap: %s\n", strerror(errno));
        return;
    }
    for (unsigned i = mapping_count; i--;)
        if (mappings[i].iova == iova)
            mappings[i] = mappings[--mapping_count];
    if (request.size == pages * PAGE)
        printf("ok\n");
    else
        printf("error removed 0x%" PRIx64 " bytes\n", (uint64_t)request.size);
}

static void dma(uint64_t from, uint64_t to, uint64_t direction)
{
    store64(0x80, from);
    store64(0x88, to);
    store64(0x90, PAGE);
    store64(0x98, 1 | direction << 1);
    time_t since = time(NULL);
    while (load32(0x98) & 1) {
        if (time(NULL) - since > DMA_LIMIT) {
            errno = ETIMEDOUT;
            die("a DMA does not end");
        }
        usleep(1000);
    }
}

// Sets up the device's one interrupt of a kind through VFIO; with an event if 'event' is not -1.
static int set_irq(uint32_t kind, uint32_t flags, uint32_t count, int event)
{
    struct {
        struct vfio_irq_set head;
        int event;
    } request = {
        .head = { .argsz = sizeof(request.head), .flags = flags, .index = kind, .count = count },
        .event = event,
    };
    if (event != -1)
        request.head.argsz += sizeof(event);
    return ioctl(device, VFIO_DEVICE_SET_IRQS, &request);
}

// Waits for an interrupt, checks that it has this cause, and enables the next one.
static void take_irq(int event, uint32_t kind, uint32_t cause)
{
    struct pollfd wait = { .fd = event, .events = POLLIN };
    uint64_t times;
    errno = 0;
    if (poll(&wait, 1, IRQ_LIMIT) != 1 || read(event, &times, sizeof(times)) != sizeof(times))
        die("no interrupt comes");
    uint32_t causes = load32(0x24);
    if (causes != cause)
        die("an interrupt comes for %x", causes);
    store32(0x64, causes);
    if (kind == VFIO_PCI_INTX_IRQ_INDEX && set_irq(kind, VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_UNMASK, 1, -1))
        die("the interrupt stays masked");
}

static void irq(const char *name, unsigned count)
{
    uint32_t kind = strcmp(name, "intx") ? VFIO_PCI_MSI_IRQ_INDEX : VFIO_PCI_INTX_IRQ_INDEX;
    int event = eventfd(0, EFD_CLOEXEC);
    if (event < 0)
        die("no event");
    if (set_irq(kind, VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER, 1, event)) {
        printf("error %s: %s\n", name, strerror(errno));
        close(event);
        return;
    }
    for (unsigned i = 0; i < count; i++) {
        store32(0x20, 0x80);
        store32(0x08, 5);
        take_irq(event, kind, 1);
        if (load32(0x08) != 120)
            die("5! is %u", load32(0x08));
        // A DMA of no bytes to the device's own memory needs no mapping.
        store64(0x80, EDU_BUFFER);
        store64(0x88, 0);
        store64(0x90, 0);
        store64(0x98, 1 | 1 << 1 | 1 << 2);
        take_irq(event, kind, 0x100);
    }
    if (set_irq(kind, VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER, 0, -1))
        die("interrupts stay on");
    close(event);
    printf("ok %u interrupts\n", 2 * count);
}

static const char *source_of(unsigned index)
{
    static const unsigned char zeros[PAGE];
    static char text[16];
    const unsigned char *page = buffer + index * PAGE;
    if (!memcmp(page, zeros, PAGE))
        return "zeros";
    for (unsigned i = 0; i < PAGES; i++)
        if (!memcmp(page, before + i * PAGE, PAGE)) {
            snprintf(text, sizeof(text), "%u", i);
            return text;
        }
    return "other";
}

static void copy(uint64_t from, uint64_t to)
{
    memcpy(before, buffer, sizeof(before));
    dma(from, EDU_BUFFER, 0);
    dma(EDU_BUFFER, to, 1);
    unsigned changed = 0;
    for (unsigned i = 0; i < PAGES; i++)
        if (memcmp(buffer + i * PAGE, before + i * PAGE, PAGE)) {
            printf("c %u %s\n", i, source_of(i));
            changed++;
            // Make the page's contents distinct again.
            fill_page(i);
        }
    printf("ok %u changed\n", changed);
}

// Prints the guest-physical address of a page of the buffer.
static double seconds(void)
{
    struct timespec now;
    if (clock_gettime(CLOCK_MONOTONIC, &now))
        die("no clock");
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

// The kernel makes all accesses of a call one after the other, so that the call itself does not count.
static void measure_registers(unsigned count)
{
    static uint64_t bytes[MAX_REGISTERS];
    off_t at = (off_t)(registers.offset + FREE_REGISTERS);
    ssize_t size = (ssize_t)(count * sizeof(bytes[0]));
    // The pages of the buffer and of the clock are there before the guest is left.
    memset(bytes, 1, sizeof(bytes));
    double begun = seconds();
    leave_guest();
    begun = seconds();
    if (pread(device, bytes, (size_t)size, at) != size)
        die("cannot read %u registers", count);
    double read = seconds();
    leave_guest();
    if (pwrite(device, bytes, (size_t)size, at) != size)
        die("cannot write %u registers", count);
    double written = seconds();
    printf("n %.0f %.0f\nok\n", (read - begun) / count * 1e9, (written - read) / count * 1e9);
}

static void print_page(unsigned index)
{
    int pagemap = open("/proc/self/pagemap", O_RDONLY);
    if (pagemap < 0)
        die("cannot open /proc/self/pagemap");
    uint64_t entry = 0;
    off_t at = (off_t)((uintptr_t)(buffer + index * PAGE) / PAGE * sizeof(entry));
    if (pread(pagemap, &entry, sizeof(entry), at) != sizeof(entry) || !(entry >> 63))
        die("page %u of the buffer is not in memory", index);
    close(pagemap);
    printf("b %u %" PRIx64 "\n", index, (entry & ((UINT64_C(1) << 55) - 1)) * PAGE);
}

static void dump(void)
{
    for (unsigned i = 0; i < mapping_count; i++) {
        const struct mapping *mapping = &mappings[i];
        for (unsigned page = 0; page < mapping->pages; page++)
            print_page(mapping->index + page);
        printf("m %" PRIx64 " %u %c%c %u\n", mapping->iova, mapping->pages,
               mapping->flags & VFIO_DMA_MAP_FLAG_READ ? 'r' : '-',
               mapping->flags & VFIO_DMA_MAP_FLAG_WRITE ? 'w' : '-', mapping->index);
    }
    printf("ok %u mappings\n", mapping_count);
}

static void run_commands(void)
{
    char line[256];
    while (fgets(line, sizeof(line), stdin)) {
        char word[16] = "", access[4] = "";
        uint64_t a = 0, b = 0;
        unsigned pages = 0, index = 0;
        if (sscanf(line, "map %" SCNx64 " %u %3[rw-] %u", &a, &pages, access, &index) == 4) {
            map(a, pages, access, index);
        } else if (sscanf(line, "unmap %" SCNx64 " %u", &a, &pages) == 2) {
            unmap(a, pages);
        } else if (sscanf(line, "copy %" SCNx64 " %" SCNx64, &a, &b) == 2) {
            copy(a, b);
        } else if (sscanf(line, "irq %15s %u", word, &index) == 2) {
            irq(word, index);
        } else if (sscanf(line, "registers %u", &index) == 1 && index > 0 && index <= MAX_REGISTERS) {
            measure_registers(index);
        } else if (sscanf(line, "where %u", &index) == 1 && index < PAGES) {
            print_page(index);
            printf("ok\n");
        } else if (sscanf(line, "%15s", word) == 1 && !strcmp(word, "dump")) {
            dump();
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
    if (argc != 2 || argv[1][0] == '-') {
        fputs(usage, stderr);
        return 2;
    }
    make_buffer();
    open_vfio(argv[1]);
    open_device();
    printf("ok\n");
    fflush(stdout);
    run_commands();
    return 0;
}
