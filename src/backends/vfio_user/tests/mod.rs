//! Tests of the parts that the tests over messages do not reach.

mod taken_over;
mod unkept;
mod windows;
