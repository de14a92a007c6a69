//! This host: what its sysfs says, what it lacks for a configuration, and the tree of its devices.

pub mod check;
pub mod sysfs;
pub mod tree;
