//! A PCI device's configuration space and BARs, through its VFIO regions.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use vfio_bindings::bindings::vfio::{
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ,
    VFIO_REGION_INFO_FLAG_WRITE,
};
use vm_memory::MmapRegion;

use super::{Bar, ioctl};
use crate::address::{Gpa, GpaRange};

// PCI Local Bus 3.0, 6.1 and 6.2.
const COMMAND: usize = 0x04;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_MASTER: u16 = 1 << 2;
const BARS: usize = 0x10;
const BAR_COUNT: usize = 6;
const BAR_IO: u32 = 1 << 0;
const BAR_TYPE: u32 = 3 << 1;
const BAR_64: u32 = 2 << 1;
const BAR_FLAGS: u32 = 0xf;
const INTERRUPT_LINE: u64 = 0x3c;
const HEADER: usize = BARS + 4 * BAR_COUNT;

/// The memory BARs at the addresses that the device's driver has written. VFIO keeps these apart from the addresses
/// in the device itself.
pub(super) fn bars(device: &File) -> io::Result<Vec<Bar>> {
    let config = ioctl::region_info(device.as_fd(), VFIO_PCI_CONFIG_REGION_INDEX)?;
    let mut header = [0; HEADER];
    device.read_exact_at(&mut header, config.offset)?;
    parse_bars(&header)
        .into_iter()
        .filter_map(|(index, address)| {
            let info = match ioctl::region_info(device.as_fd(), index) {
                Ok(info) => info,
                Err(cause) => return Some(Err(cause)),
            };
            GpaRange::from_len(Gpa(address), info.size).map(|range| Ok(Bar { index, range }))
        })
        .collect()
}

/// The numbers and addresses of the memory BARs in a configuration header; none while memory decoding is off.
fn parse_bars(header: &[u8; HEADER]) -> Vec<(u32, u64)> {
    let command = u16::from_le_bytes([header[COMMAND], header[COMMAND + 1]]);
    if command & COMMAND_MEMORY == 0 {
        return Vec::new();
    }
    let mut registers = header[BARS..]
        .chunks_exact(4)
        .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .zip(0u32..);
    let mut found = Vec::new();
    while let Some((low, index)) = registers.next() {
        if low & BAR_IO != 0 {
            continue;
        }
        let high = if low & BAR_TYPE == BAR_64 {
            registers.next().map_or(0, |(high, _)| high)
        } else {
            0
        };
        let address = u64::from(high) << 32 | u64::from(low & !BAR_FLAGS);
        if address != 0 {
            found.push((index, address));
        }
    }
    found
}

/// Clears the bus-master bit in the command register.
pub(super) fn clear_bus_master(device: &File) -> io::Result<()> {
    let config = ioctl::region_info(device.as_fd(), VFIO_PCI_CONFIG_REGION_INDEX)?;
    let at = config.offset + COMMAND as u64;
    let mut command = [0; 2];
    device.read_exact_at(&mut command, at)?;
    let cleared = u16::from_le_bytes(command) & !COMMAND_MASTER;
    device.write_all_at(&cleared.to_le_bytes(), at)
}

/// The register that says which line of an interrupt controller the device's interrupt reaches. Hardware ignores it. VFIO
/// keeps what is written to it for as long as the device is open, and the hardware never sees it.
pub(super) fn interrupt_line(device: &File) -> io::Result<u8> {
    let config = ioctl::region_info(device.as_fd(), VFIO_PCI_CONFIG_REGION_INDEX)?;
    let mut line = [0];
    device.read_exact_at(&mut line, config.offset + INTERRUPT_LINE)?;
    Ok(line[0])
}

/// Writes to [`interrupt_line`].
pub(super) fn set_interrupt_line(device: &File, line: u8) -> io::Result<()> {
    let config = ioctl::region_info(device.as_fd(), VFIO_PCI_CONFIG_REGION_INDEX)?;
    device.write_all_at(&[line], config.offset + INTERRUPT_LINE)
}

/// Maps a whole BAR.
pub(super) fn map(device: &File, index: u32) -> io::Result<MmapRegion> {
    let info = ioctl::region_info(device.as_fd(), index)?;
    let all = VFIO_REGION_INFO_FLAG_MMAP | VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
    if info.flags & all != all {
        return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
    }
    ioctl::map_region(device.as_fd(), info.offset, info.size)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(command: u16, registers: [u32; 6]) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        header[COMMAND..COMMAND + 2].copy_from_slice(&command.to_le_bytes());
        for (at, register) in registers.into_iter().enumerate() {
            let at = BARS + 4 * at;
            header[at..at + 4].copy_from_slice(&register.to_le_bytes());
        }
        header
    }

    #[test]
    fn memory_bars_are_distinguished_from_other_bars() {
        let registers = [0xfebf_0000, 0xc001, 0xe000_000c, 0x1, 0, 0xfec0_0008];
        assert_eq!(
            parse_bars(&header(COMMAND_MEMORY, registers)),
            [(0, 0xfebf_0000), (2, 0x1_e000_0000), (5, 0xfec0_0000)]
        );
        assert!(parse_bars(&header(COMMAND_MASTER, registers)).is_empty());
    }

    #[test]
    fn a_64_bit_bar_in_the_last_register_has_an_upper_half_of_0() {
        let registers = [0, 0, 0, 0, 0, 0xe000_0004];
        assert_eq!(
            parse_bars(&header(COMMAND_MEMORY, registers)),
            [(5, 0xe000_0000)]
        );
    }
}
