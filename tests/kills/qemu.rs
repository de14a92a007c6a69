//! Unmodified QEMU.
