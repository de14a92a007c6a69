//! What was seen with servers of libvfio-user, each as a test: by a limit of windows, refusals, empty answers, pauses.

use std::time::Duration;

use vhost_device_iommu::address::{Access, Gpa, Mapping};
use vhost_device_iommu::backends::BackendErrorKind;
use vhost_device_iommu::backends::vfio_user::Isolation;
use vhost_device_iommu::ids::DomainId;
use vhost_device_iommu::iommu::RequestError;

use super::{Library, UNSERVED, UnmapAll, Version};
use crate::bed::{Bed, RAM, event, range};
use crate::connection::{
    Connection, DIRTY_PAGES, FEATURE, REGION_READ, REGION_WRITE, SET_IRQS, irqs, region,
};

pub(super) const IOVA: u64 = 0x4000_0000;
pub(super) const PAGE: u64 = 0x1000;

/// A server, and a client that has negotiated with it. All windows of this moment have been sent.
pub(super) fn start(bed: &Bed, version: Version) -> (Connection, Library) {
    let library = Library::start(bed.listen(), version);
    let mut client = bed.client();
    assert_eq!(read_register(&mut client), 0);
    (client, library)
}

/// Reads a register, which the server does after all windows that were sent before. Returns the errno.
fn read_register(client: &mut Connection) -> i32 {
    let reply = client.call(REGION_READ, &region(0x10, 0, 4, &[]), &[]);
    reply.errno()
}

/// Page `n` of the windows of these tests. No two of them adjoin.
pub(super) fn window(n: u64) -> u64 {
    IOVA + 2 * n * PAGE
}

fn map(bed: &Bed, n: u64) -> Result<(), RequestError> {
    bed.map(window(n), n % 1024 * PAGE, PAGE, Access::READ_WRITE)
}

pub(super) fn assert_lives(bed: &Bed, client: &mut Connection, library: &Library) {
    assert_lives_after(0, bed, client, library);
}

/// The server has not been cut off since it was restarted so many times.
pub(super) fn assert_lives_after(
    restarts: usize,
    bed: &Bed,
    client: &mut Connection,
    library: &Library,
) {
    assert_eq!(read_register(client), 0);
    let endpoint = bed.iommu().endpoint(bed.endpoint()).expect("known");
    assert!(!endpoint.quarantined);
    assert_eq!(bed.watch.state().ends.cut_offs, 0);
    assert_eq!(library.state().connections, 1 + restarts, "connections");
}

fn kind(refused: &RequestError) -> BackendErrorKind {
    match refused {
        RequestError::Backend(cause) => cause.kind,
        other => panic!("{other}"),
    }
}

#[test]
fn a_refused_access_to_a_register_costs_this_access() {
    let bed = Bed::new(Isolation::Messages);
    let (mut client, library) = start(&bed, Version::OF_2026);
    let refused = [
        (REGION_READ, region(UNSERVED, 7, 4, &[])),
        (REGION_WRITE, region(UNSERVED, 7, 4, &[1; 4])),
        (REGION_READ, region(0, 9, 4, &[])),
        (REGION_READ, region(0xffe, 0, 4, &[])),
        (
            FEATURE,
            [[8u32, 1 << 16 | 1].map(u32::to_ne_bytes)]
                .as_flattened()
                .as_flattened()
                .to_vec(),
        ),
    ];
    for (cmd, body) in refused {
        let reply = client.call(cmd, &body, &[]);
        assert_eq!((reply.errno(), reply.body.len()), (libc::EINVAL, 0));
    }
    assert_lives(&bed, &mut client, &library);
}

#[test]
fn an_access_of_no_bytes_has_an_empty_reply() {
    let bed = Bed::new(Isolation::Messages);
    let (mut client, library) = start(&bed, Version::OF_2026);
    for cmd in [REGION_READ, REGION_WRITE] {
        let reply = client.call(cmd, &region(0x10, 0, 0, &[]), &[]);
        assert_eq!((reply.errno(), reply.body.len()), (0, 0));
    }
    assert_lives(&bed, &mut client, &library);
}

/// The log of a server has the addresses of the guest's domain, which the client would take for guest-physical ones.
#[test]
fn logs_of_written_pages_are_refused_and_do_not_reach_the_server() {
    let bed = Bed::new(Isolation::Messages);
    let (mut client, library) = start(&bed, Version::OF_2026);
    for (cmd, flags) in [
        (DIRTY_PAGES, 1u32),
        (FEATURE, 6 | 1 << 17),
        (FEATURE, 8 | 1 << 16),
    ] {
        let body = [24u32.to_ne_bytes(), flags.to_ne_bytes(), [0; 4]].concat();
        assert_eq!(client.call(cmd, &body, &[]).errno(), libc::ENOTSUP);
    }
    assert_lives(&bed, &mut client, &library);
}

/// The server takes 8 descriptors with a message, and the client up to 16.
#[test]
fn more_interrupts_than_the_server_takes_at_once_are_refused() {
    use std::os::fd::AsFd;
    let bed = Bed::new(Isolation::Messages);
    let (mut client, library) = start(&bed, Version::OF_2026);
    let event = event();
    for (count, errno) in [(8, 0), (9, libc::E2BIG)] {
        let fds = vec![event.as_fd(); count];
        let body = irqs(0x24, 2, 0, u32::try_from(count).expect("few"));
        assert_eq!(client.call(SET_IRQS, &body, &fds).errno(), errno);
    }
    assert_lives(&bed, &mut client, &library);
}

/// No limit of windows, and no pause, concerns a server that is told regions.
#[test]
fn mappings_send_nothing_to_a_server_that_is_told_regions() {
    const COUNT: usize = 300;
    let bed = Bed::new(Isolation::Messages);
    bed.attach();
    let version = Version {
        pause: Duration::from_millis(50),
        twin_socket: true,
        ..Version::OF_2021
    };
    let (mut client, library) = start(&bed, version);
    map_many(&bed, 1, COUNT);
    assert_eq!(library.windows(), [(0, 8 << 40)]);
    bed.poke(5 * PAGE, b"here");
    assert_eq!(library.read(window(5), 4), Ok(b"here".to_vec()));
    assert_eq!(library.write(window(7), b"back"), Ok(()));
    assert_eq!(bed.peek(7 * PAGE, 4), b"back");
    // The library believes that it may access all of the region.
    assert_eq!(library.read(window(5) + PAGE, 4), Err(libc::EFAULT));
    bed.unmap(0, u64::MAX).expect("unmapped");
    assert_eq!(library.read(window(5), 4), Err(libc::EFAULT));
    assert_eq!(library.state().pauses, 1);
    assert_lives(&bed, &mut client, &library);
}

#[test]
fn a_window_beyond_the_limit_is_a_lack_of_memory_and_the_server_stays() {
    for isolation in [Isolation::ExactMessages, Isolation::Mappings] {
        for version in [Version::OF_2021, Version::OF_2025] {
            let limit = version.max_regions as u64;
            let bed = Bed::new(isolation);
            bed.attach();
            let (mut client, library) = start(&bed, version);
            map_many(&bed, 1, version.max_regions);
            for n in [limit, limit + 1] {
                let refused = map(&bed, n).expect_err("beyond the limit");
                assert_eq!(kind(&refused), BackendErrorKind::NoMem, "{refused}");
            }
            assert_eq!(library.windows().len() as u64, limit);
            bed.unmap(window(3), PAGE).expect("unmapped");
            map(&bed, limit).expect("there is room now");
            bed.unmap(0, u64::MAX).expect("unmapped");
            assert_eq!(library.windows(), []);
            assert_lives(&bed, &mut client, &library);
        }
    }
}

/// The process of a server cannot map as many windows as the library takes.
#[test]
fn a_window_that_the_server_cannot_map_is_a_lack_of_memory_and_the_server_stays() {
    const LIMIT: u64 = 40;
    let version = Version {
        max_mapped: 40,
        ..Version::OF_2026
    };
    for isolation in [Isolation::Mappings, Isolation::ExactMessages] {
        let bed = Bed::new(isolation);
        bed.attach();
        let (mut client, library) = start(&bed, version);
        map_many(&bed, 1, version.max_mapped);
        let next = map(&bed, LIMIT);
        if isolation == Isolation::Mappings {
            let refused = next.expect_err("the server has mapped all that it can");
            assert_eq!(kind(&refused), BackendErrorKind::NoMem, "{refused}");
            bed.unmap(window(3), PAGE).expect("unmapped");
            map(&bed, LIMIT).expect("there is room now");
        } else {
            next.expect("a window without a descriptor is not mapped");
        }
        assert_lives(&bed, &mut client, &library);
    }
}

/// A server that connects to a domain with more windows than it takes.
#[test]
fn a_server_that_takes_fewer_windows_than_there_are_keeps_those_that_it_has() {
    let bed = Bed::new(Isolation::ExactMessages);
    bed.attach();
    map_many(&bed, 1, 40);
    let version = Version {
        twin_socket: true,
        ..Version::OF_2021
    };
    let (mut client, library) = start(&bed, version);
    let first: Vec<_> = (0..16).map(|n| (window(n), PAGE)).collect();
    assert_eq!(library.windows(), first);
    let limits = bed.watch.state().limits;
    assert_eq!((limits.most, limits.missing, limits.refused), (16, 24, 24));
    // The library does not know the others, and asks for none of them.
    assert_eq!(library.read(window(0), 1).map(|data| data.len()), Ok(1));
    assert_eq!(library.read(window(39), 1), Err(libc::ENOENT));
    bed.unmap(0, u64::MAX).expect("unmapped");
    assert_eq!(library.windows(), []);
    assert_lives(&bed, &mut client, &library);
}

/// The library removes exact regions only.
#[test]
fn windows_are_removed_as_they_were_announced() {
    let bed = Bed::new(Isolation::Mappings);
    bed.attach();
    let (mut client, library) = start(&bed, Version::OF_2026);
    // Neighbours, one of several pages, and two that lead to adjoining memory.
    for (n, pages) in [(0, 1), (1, 3), (4, 1), (5, 512), (517, 1)] {
        let at = n % 512 * PAGE;
        bed.map(IOVA + n * PAGE, at, pages * PAGE, Access::READ_WRITE)
            .expect("mapped");
    }
    assert_eq!(library.windows().len(), 5);
    bed.unmap(IOVA + PAGE, 4 * PAGE).expect("unmapped");
    let left = [(0, 1), (5, 512), (517, 1)];
    let left = left.map(|(n, pages)| (IOVA + n * PAGE, pages * PAGE));
    assert_eq!(library.windows(), left);
    bed.unmap(0, u64::MAX).expect("unmapped");
    assert_eq!(library.windows(), []);
    assert_lives(&bed, &mut client, &library);
}

/// `vfu_sgl_get` needs a descriptor; without one, the device of the server must send messages.
#[test]
fn a_server_loads_memory_only_where_it_has_a_descriptor() {
    for (isolation, loaded) in [
        (Isolation::Mappings, Ok(b"page".to_vec())),
        (Isolation::ExactMessages, Err(libc::EFAULT)),
        (Isolation::Messages, Err(libc::EFAULT)),
    ] {
        let bed = Bed::new(isolation);
        bed.attach();
        let (mut client, library) = start(&bed, Version::OF_2026);
        map(&bed, 3).expect("mapped");
        bed.poke(3 * PAGE, b"page");
        assert_eq!(library.load(window(3), 4), loaded, "{isolation:?}");
        assert_eq!(library.read(window(3), 4), Ok(b"page".to_vec()));
        assert_lives(&bed, &mut client, &library);
    }
}

/// An ATTACH to another domain removes all windows. The library removes them with one message; a server that refuses this
/// message, or does something else, gets one for each window. No domain is left while the server has a window of it.
#[test]
fn windows_of_a_former_domain_are_removed_whatever_the_server_does_with_a_removal_of_all() {
    const COUNT: usize = 100;
    let library = Version::OF_2026;
    let with = |unmap_all, unknown| Version {
        unmap_all,
        unknown,
        ..library
    };
    let (removes, unknown) = (UnmapAll::Removes, library.unknown);
    // The messages of a trial: three for windows, one more for the first of these, and one for all.
    let each = COUNT + 2;
    for (version, first, second) in [
        (library, 5, 1),
        // The `vfio_user` crate refuses with errno 0.
        (with(removes, Err(0)), 5, 1),
        (with(removes, Ok(())), each, COUNT),
        (with(UnmapAll::Refuses(libc::EINVAL), unknown), each, COUNT),
        (with(UnmapAll::Refuses(libc::ENOTSUP), unknown), each, COUNT),
        (with(UnmapAll::Ignores, unknown), each, COUNT),
        (with(UnmapAll::Ignores, Ok(())), each, COUNT),
        (with(UnmapAll::RemovesHalf, Ok(())), each, COUNT),
    ] {
        for isolation in [Isolation::ExactMessages, Isolation::Mappings] {
            let bed = Bed::new(isolation);
            bed.attach();
            let (mut client, library) = start(&bed, version);
            let mut unmaps = 0;
            for (domain, sent) in [(1, first), (2, second), (1, second)] {
                map_many(&bed, domain, COUNT);
                assert_eq!(library.windows().len(), COUNT);
                attach(&bed, 3 - domain).expect("attached");
                assert_eq!(library.windows(), []);
                unmaps += sent;
                assert_eq!(library.state().unmaps, unmaps, "{version:?}");
            }
            assert_lives(&bed, &mut client, &library);
            // Few windows are not worth it.
            map_many(&bed, 2, 3);
            attach(&bed, 1).expect("attached");
            assert_eq!(library.windows(), []);
            assert_eq!(library.state().unmaps, unmaps + 3);
            assert_lives(&bed, &mut client, &library);
        }
    }
}

/// A server with memory whose answers do not show that it has removed the windows is cut off.
#[test]
fn a_server_that_may_keep_windows_of_a_former_domain_is_cut_off() {
    const COUNT: usize = 100;
    for version in [
        Version {
            unmap_all: UnmapAll::RemovesHalf,
            ..Version::OF_2026
        },
        Version {
            unmap_all: UnmapAll::Hangs(libc::EBUSY),
            ..Version::OF_2026
        },
    ] {
        for isolation in [Isolation::ExactMessages, Isolation::Mappings] {
            let bed = Bed::new(isolation);
            bed.attach();
            let (mut client, library) = start(&bed, version);
            map_many(&bed, 1, COUNT);
            let attached = attach(&bed, 2);
            if isolation == Isolation::Mappings {
                let refused = attached
                    .expect_err("the server may have windows")
                    .to_string();
                assert!(refused.contains("refuses to remove"), "{refused}");
                assert_eq!(bed.watch.state().ends.cut_offs, 1);
            } else {
                // Each of its accesses is a message.
                attached.expect("attached");
                assert_lives(&bed, &mut client, &library);
            }
        }
    }
}

/// Maps so many windows in a domain.
pub(super) fn map_many(bed: &Bed, domain: u32, count: usize) {
    for n in 0..count as u64 {
        let mapping = Mapping {
            range: range(window(n), PAGE),
            gpa: Gpa(RAM + n % 1024 * PAGE),
            access: Access::READ_WRITE,
            mmio: false,
        };
        let mapped = bed.iommu().map(DomainId(domain), &mapping);
        mapped.expect("mapped");
    }
}

fn attach(bed: &Bed, domain: u32) -> Result<(), RequestError> {
    bed.iommu().attach(bed.endpoint(), DomainId(domain), false)
}
