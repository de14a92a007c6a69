//! The host: facts from its sysfs, a check against a configuration, and the tree of its devices.

pub mod check;
pub mod sysfs;
pub mod tree;
