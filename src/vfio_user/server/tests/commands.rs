//! Commands, and the calls of the device that they cause.

use zerocopy::IntoBytes;

use super::{TestClient, access};
use crate::vfio_user::message::{
    Command, DeviceInfoBody, DmaMapBody, DmaUnmapBody, Header, IRQ_ACTION_MASK, IRQ_ACTION_TRIGGER,
    IRQ_DATA_BOOL, IRQ_DATA_EVENTFD, IRQ_DATA_NONE, IrqInfoBody, IrqSetBody, Kind, MAX_DATA,
    REGION_CAP_TYPE, REGION_CAPS, REGION_READ, REGION_WRITE, RegionInfoBody, WriteMultiBody,
    WriteOneBody, take,
};
use crate::vfio_user::server::ClientEnd;

fn set_irqs(flags: u32, index: u32, start: u32, count: u32, data: &[u8]) -> Vec<u8> {
    let set = IrqSetBody {
        argsz: IrqSetBody::BYTES.into(),
        flags: flags.into(),
        index: index.into(),
        start: start.into(),
        count: count.into(),
    };
    [set.as_bytes(), data].concat()
}

#[test]
fn the_device_is_described_to_the_client() {
    let mut client = TestClient::negotiated();
    let body = client.call(Command::DeviceGetInfo, &[0; 16]).expect("info");
    let (info, _) = take::<DeviceInfoBody>(Command::DeviceGetInfo, &body).expect("whole");
    assert_eq!((info.argsz.get(), info.flags.get()), (16, 3));
    assert_eq!((info.regions.get(), info.irqs.get()), (3, 2));
    let mut region = |index: u32, argsz: u32| {
        let request = RegionInfoBody {
            argsz: argsz.into(),
            flags: 0.into(),
            index: index.into(),
            cap_offset: 0.into(),
            size: 0.into(),
            offset: 0.into(),
        };
        client.call(Command::DeviceGetRegionInfo, request.as_bytes())
    };
    let decode = |body: &[u8]| {
        let (info, chain) =
            take::<RegionInfoBody>(Command::DeviceGetRegionInfo, body).expect("whole");
        (
            info.argsz.get(),
            info.flags.get(),
            info.cap_offset.get(),
            info.size.get(),
            chain.len(),
        )
    };
    let flags = REGION_READ | REGION_WRITE | REGION_CAPS;
    let short = region(0, 32).expect("region 0");
    assert_eq!(
        decode(&short),
        (48, flags, 32, 64, 0),
        "no room for the capability"
    );
    let whole = region(0, 48).expect("region 0");
    assert_eq!(decode(&whole), (48, flags, 32, 64, 16));
    assert_eq!(
        whole[32..34],
        REGION_CAP_TYPE.to_ne_bytes(),
        "without a file, its type alone"
    );
    assert_eq!(decode(&region(2, 48).expect("absent")), (32, 0, 0, 0, 0));
    assert_eq!(region(3, 48), Err(libc::EINVAL));
    let mut irq = |index: u32| {
        let request = IrqInfoBody {
            argsz: IrqInfoBody::BYTES.into(),
            flags: 0.into(),
            index: index.into(),
            count: 0.into(),
        };
        let body = client.call(Command::DeviceGetIrqInfo, request.as_bytes())?;
        let (info, _) = take::<IrqInfoBody>(Command::DeviceGetIrqInfo, &body).expect("whole");
        Ok((info.flags.get(), info.count.get()))
    };
    assert_eq!(
        (irq(0), irq(1), irq(2)),
        (Ok((1, 0)), Ok((1, 4)), Err(libc::EINVAL))
    );
    assert!(matches!(client.end(), (Ok(ClientEnd::HungUp), calls) if calls.is_empty()));
}

#[test]
fn the_device_gets_only_accesses_within_its_regions() {
    let mut client = TestClient::negotiated();
    let write = [access(0, 4, 2).as_bytes(), b"ab"].concat();
    let reply = client.call(Command::RegionWrite, &write).expect("written");
    assert_eq!(reply, access(0, 4, 2).as_bytes());
    let reply = client.call(Command::RegionRead, access(0, 4, 2).as_bytes());
    assert_eq!(reply, Ok([access(0, 4, 2).as_bytes(), b"ab"].concat()));
    let short = client.call(Command::RegionRead, access(0, 60, 4).as_bytes());
    assert_eq!(short, Ok([access(0, 60, 3).as_bytes(), &[0; 3]].concat()));
    for (region, offset, count, errno) in [
        (0, 64, 1, libc::EINVAL),
        (0, 63, 2, libc::EINVAL),
        (0, u64::MAX, 1, libc::EINVAL),
        (2, 0, 0, libc::EINVAL),
        (3, 0, 1, libc::EINVAL),
        (1, 0, MAX_DATA + 1, libc::E2BIG),
    ] {
        let reply = client.call(
            Command::RegionRead,
            access(region, offset, count).as_bytes(),
        );
        assert_eq!(reply, Err(errno), "{region} {offset:#x} {count}");
    }
    let read_only = [access(1, 0, 1).as_bytes(), &[0]].concat();
    assert_eq!(
        client.call(Command::RegionWrite, &read_only),
        Err(libc::EPERM)
    );
    let entry = |offset: u64, count: u32, byte: u8| WriteOneBody {
        offset: offset.into(),
        region: 0.into(),
        count: count.into(),
        data: [byte; 8],
    };
    for (entries, expected) in [
        (
            [entry(0, 1, 1), entry(1, 1, 0xff), entry(2, 1, 2)],
            Ok(1u64),
        ),
        (
            [entry(0, 9, 1), entry(1, 1, 1), entry(2, 1, 1)],
            Err(libc::EINVAL),
        ),
    ] {
        let count = WriteMultiBody { count: 3.into() };
        let entries = entries.map(|e| e.as_bytes().to_vec()).concat();
        let reply = client.call(
            Command::RegionWriteMulti,
            &[count.as_bytes(), &entries].concat(),
        );
        assert_eq!(reply, expected.map(|n| n.to_ne_bytes().to_vec()));
    }
    let (_, calls) = client.end();
    assert_eq!(calls, ["read 0 0x4 2", "read 0 0x3c 4"]);
}

#[test]
fn the_device_gets_only_interrupts_that_it_has() {
    let mut client = TestClient::negotiated();
    let trigger = IRQ_ACTION_TRIGGER;
    for (flags, start, count, data) in [
        (IRQ_DATA_NONE | trigger, 0, 0, &[][..]),
        (IRQ_DATA_NONE | IRQ_ACTION_MASK, 1, 3, &[]),
        (IRQ_DATA_BOOL | trigger, 2, 2, &[0, 1]),
        (IRQ_DATA_EVENTFD | trigger, 0, 2, &[]),
    ] {
        let body = set_irqs(flags, 1, start, count, data);
        assert_eq!(
            client.call(Command::DeviceSetIrqs, &body),
            Ok(Vec::new()),
            "{flags:#x}"
        );
    }
    for (flags, index, start, count) in [
        (IRQ_DATA_NONE | trigger, 2, 0, 1),
        (IRQ_DATA_NONE | trigger, 0, 0, 1),
        (IRQ_DATA_NONE | trigger, 1, 1, 4),
        (IRQ_DATA_NONE | trigger, 1, u32::MAX, 2),
        (IRQ_DATA_NONE | IRQ_ACTION_MASK, 1, 0, 0),
        (IRQ_DATA_NONE | IRQ_ACTION_MASK | trigger, 1, 0, 1),
        (IRQ_DATA_NONE, 1, 0, 1),
        (trigger, 1, 0, 1),
        (IRQ_DATA_NONE | IRQ_DATA_EVENTFD | trigger, 1, 0, 1),
        (IRQ_DATA_NONE | trigger | 1 << 6, 1, 0, 1),
    ] {
        let body = set_irqs(flags, index, start, count, &[]);
        let reply = client.call(Command::DeviceSetIrqs, &body);
        assert_eq!(
            reply,
            Err(libc::EINVAL),
            "{flags:#x} {index} {start} {count}"
        );
    }
    let (_, calls) = client.end();
    let expected = [
        "Trigger 1 from 0: disable",
        "Mask 1 from 1: all 3",
        "Trigger 1 from 2: chosen [0, 1]",
        "Trigger 1 from 0: eventfds [false, false]",
    ];
    assert_eq!(calls, expected);
}

#[test]
fn the_device_decides_on_windows_and_resets() {
    let mut client = TestClient::negotiated();
    let map = |address: u64| DmaMapBody {
        argsz: DmaMapBody::BYTES.into(),
        flags: 3.into(),
        offset: 0.into(),
        address: address.into(),
        size: 0x1000.into(),
    };
    assert_eq!(
        client.call(Command::DmaMap, map(0x1000).as_bytes()),
        Ok(Vec::new())
    );
    assert_eq!(
        client.call(Command::DmaMap, map(0).as_bytes()),
        Err(libc::ENOSPC)
    );
    let unmap = DmaUnmapBody {
        argsz: DmaUnmapBody::BYTES.into(),
        flags: 0.into(),
        address: 0x1000.into(),
        size: 0x1000.into(),
    };
    let reply = client.call(Command::DmaUnmap, unmap.as_bytes());
    assert_eq!(reply, Ok(unmap.as_bytes().to_vec()));
    assert_eq!(client.call(Command::DeviceReset, &[]), Ok(Vec::new()));
    assert_eq!(
        client.call(Command::DeviceFeature, &[0; 8]),
        Err(libc::ENOTSUP)
    );
    let no_reply = Header {
        kind: Kind::Command { no_reply: true },
        ..Header::command(1, Command::DeviceReset, 0)
    };
    client.send(&no_reply.encode());
    assert_eq!(
        client.call(Command::DeviceReset, &[]),
        Ok(Vec::new()),
        "the next reply"
    );
    let (_, calls) = client.end();
    let maps = [
        "map 0x1000, file false",
        "map 0x0, file false",
        "unmap 0x1000",
    ];
    assert_eq!(calls[..3], maps);
    assert_eq!(calls[3..], ["reset"; 3]);
}
