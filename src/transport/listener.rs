//! Takes over an inherited socket for VMMs to connect to.
#![expect(
    unsafe_code,
    reason = "getsockopt, to check the type of an inherited socket"
)]

use std::io;
use std::os::fd::RawFd;
use std::os::unix::net::UnixListener;

use crate::process::inherited::adopt;

/// Takes over the inherited descriptor `fd`, which must be a listening Unix stream socket.
///
/// # Errors
/// Says why the descriptor cannot be used.
pub fn inherit(fd: RawFd) -> Result<UnixListener, String> {
    match socket_option(fd, libc::SO_ACCEPTCONN) {
        Ok(1) => {}
        Ok(_) => return Err("it does not listen".into()),
        Err(cause) => return Err(cause.to_string()),
    }
    if !matches!(socket_option(fd, libc::SO_DOMAIN), Ok(libc::AF_UNIX))
        || !matches!(socket_option(fd, libc::SO_TYPE), Ok(libc::SOCK_STREAM))
    {
        return Err("it is not a Unix stream socket".into());
    }
    let listener = UnixListener::from(adopt(fd).map_err(|cause| cause.to_string())?);
    // With a non-blocking listener the backend crate would spin.
    listener
        .set_nonblocking(false)
        .map_err(|cause| cause.to_string())?;
    Ok(listener)
}

fn socket_option(fd: RawFd, option: libc::c_int) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut len: libc::socklen_t = 4;
    // SAFETY:
    // - value and len: valid for writes for the whole call; len is the size of value
    // - fd: any number is allowed; for a closed descriptor the call fails
    let done = unsafe {
        libc::getsockopt(
            fd,
            libc::SOL_SOCKET,
            option,
            (&raw mut value).cast(),
            &raw mut len,
        )
    };
    if done == 0 {
        Ok(value)
    } else {
        Err(io::Error::last_os_error())
    }
}
