//! The kernel's checks of VF tokens, with its errnos (Linux 7.3: `vfio_pci_core_match_token_uuid` and `vfio_pci_core_match`
//! of `pci/vfio_pci_core.c`, `vfio_df_ioctl_bind_iommufd` of `device_cdev.c`, `uuid_parse` of `lib/uuid.c`).

use std::cell::RefCell;
use std::ffi::CStr;
use std::io;
use std::rc::Rc;

use vfio_bindings::bindings::vfio::{VFIO_DEVICE_BIND_FLAG_TOKEN, vfio_device_bind_iommufd};

use super::error;
use crate::ids::VfToken;

type Uuid = [u8; 16];

/// What VFIO knows of a physical function that it holds.
#[derive(Debug)]
struct Physical {
    token: Uuid,
    /// The number of its virtual functions that are open.
    users: u32,
}

/// A function that VFIO holds.
#[derive(Debug)]
struct FakeFunction {
    name: &'static str,
    role: FunctionRole,
}

#[derive(Debug)]
enum FunctionRole {
    /// It has no SR-IOV.
    Plain,
    Physical(Rc<RefCell<Physical>>),
    /// A virtual function; `None` if another driver than VFIO's has its physical function.
    Virtual(Option<Rc<RefCell<Physical>>>),
}

impl FakeFunction {
    /// `vfio_pci_core_match_token_uuid`.
    fn match_token(&self, given: Option<Uuid>) -> io::Result<()> {
        match (&self.role, given) {
            (FunctionRole::Plain | FunctionRole::Virtual(None), None) => Ok(()),
            (FunctionRole::Plain | FunctionRole::Virtual(None), Some(_)) => {
                Err(error(libc::EINVAL))
            }
            (FunctionRole::Virtual(Some(physical)), given) => {
                let physical = physical.borrow();
                let matches = given == Some(physical.token);
                matches.then_some(()).ok_or_else(|| error(libc::EACCES))
            }
            (FunctionRole::Physical(physical), given) => {
                let mut physical = physical.borrow_mut();
                if physical.users > 0 && given != Some(physical.token) {
                    return Err(error(libc::EACCES));
                }
                physical.token = given.unwrap_or(physical.token);
                Ok(())
            }
        }
    }

    /// `VFIO_GROUP_GET_DEVICE_FD` of the function's group.
    fn open(&self, request: &CStr) -> io::Result<()> {
        let request = request.to_str().expect("ASCII");
        let rest = request.strip_prefix(self.name);
        let mut rest = rest.ok_or_else(|| error(libc::ENODEV))?;
        if !rest.is_empty() && !rest.starts_with(' ') {
            return Err(error(libc::ENODEV));
        }
        let mut token = None;
        while !rest.is_empty() {
            if let Some(blank) = rest.strip_prefix(' ') {
                rest = blank;
                continue;
            }
            let value = rest.strip_prefix("vf_token=").filter(|_| token.is_none());
            let (text, behind) = value
                .and_then(|value| value.split_at_checked(36))
                .ok_or_else(|| error(libc::EINVAL))?;
            token = Some(parse(text).ok_or_else(|| error(libc::EINVAL))?);
            rest = behind;
        }
        self.match_token(token)
    }

    /// `VFIO_DEVICE_BIND_IOMMUFD`. `memory` are the bytes that the argument may point to.
    fn bind(&self, argument: &vfio_device_bind_iommufd, memory: &[&Uuid]) -> io::Result<()> {
        let has_field = argument.argsz >= 24;
        if argument.argsz < 16 || argument.iommufd < 0 {
            return Err(error(libc::EINVAL));
        }
        if argument.flags & !VFIO_DEVICE_BIND_FLAG_TOKEN != 0 {
            return Err(error(libc::EINVAL));
        }
        if argument.flags == 0 {
            return self.match_token(None);
        }
        // A field that the argument does not have is zero.
        let at = if has_field {
            argument.token_uuid_ptr
        } else {
            0
        };
        let points_to = |uuid: &&&Uuid| uuid.as_ptr().addr() as u64 == at;
        let uuid = memory.iter().find(points_to);
        self.match_token(Some(**uuid.ok_or_else(|| error(libc::EFAULT))?))
    }
}

/// `uuid_parse`.
fn parse(text: &str) -> Option<Uuid> {
    const PLACES: [usize; 16] = [0, 2, 4, 6, 9, 11, 14, 16, 19, 21, 24, 26, 28, 30, 32, 34];
    let hyphens = [8, 13, 18, 23];
    let is_valid = |(at, c): (usize, char)| match hyphens.contains(&at) {
        true => c == '-',
        false => c.is_ascii_hexdigit(),
    };
    if !text.chars().enumerate().all(is_valid) {
        return None;
    }
    let byte = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).expect("two digits");
    Some(PLACES.map(byte))
}

mod tests {
    use super::*;
    use crate::vfio::cdev::{GroupSource, token_cure};
    use crate::vfio::{fake, ioctl};

    const NAME: &str = "0000:04:10.0";
    const TEXT: &str = "bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3";
    const OTHER: &str = "bd8d9d2b-5a5f-4f5a-a211-f591514ba1f4";

    fn token(text: &str) -> VfToken {
        text.parse().expect("a UUID")
    }

    fn physical(text: &str, users: u32) -> Rc<RefCell<Physical>> {
        let token = parse(text).expect("a UUID");
        Rc::new(RefCell::new(Physical { token, users }))
    }

    fn function(role: FunctionRole) -> FakeFunction {
        FakeFunction { name: NAME, role }
    }

    /// The errno of each way to open a function: through its group, and through its node.
    fn refusals(function: &FakeFunction, token: Option<VfToken>) -> [Option<i32>; 2] {
        let source = GroupSource {
            group: std::sync::Arc::new(fake::memfd(0)),
            name: c"0000:04:10.0".into(),
            token,
        };
        let argument = ioctl::bind_argument(3, token.as_ref());
        let memory: Vec<_> = token.iter().map(VfToken::as_bytes).collect();
        let opened = [
            function.open(&source.request()),
            function.bind(&argument, &memory),
        ];
        opened.map(|done| done.err().and_then(|cause| cause.raw_os_error()))
    }

    #[test]
    fn each_function_is_opened_with_the_token_that_vfio_asks_for() {
        let (acces, inval) = (Some(libc::EACCES), Some(libc::EINVAL));
        let of_vfio = |users| function(FunctionRole::Physical(physical(TEXT, users)));
        let virtual_function = |pf| function(FunctionRole::Virtual(pf));
        for (function, without, right, wrong) in [
            (function(FunctionRole::Plain), None, inval, inval),
            (virtual_function(None), None, inval, inval),
            (
                virtual_function(Some(physical(TEXT, 0))),
                acces,
                None,
                acces,
            ),
            (
                virtual_function(Some(physical(TEXT, 1))),
                acces,
                None,
                acces,
            ),
            (of_vfio(1), acces, None, acces),
        ] {
            let check = |token, wanted| {
                assert_eq!(refusals(&function, token), [wanted; 2], "{function:?}");
            };
            check(None, without);
            check(Some(token(TEXT)), right);
            check(Some(token(OTHER)), wrong);
        }
        // A physical function without users takes any token, which then is its virtual functions'.
        let pf = physical(OTHER, 0);
        let vf = virtual_function(Some(pf.clone()));
        let pf = function(FunctionRole::Physical(pf));
        assert_eq!(refusals(&pf, None), [None; 2]);
        assert_eq!(refusals(&vf, Some(token(TEXT))), [acces; 2]);
        assert_eq!(refusals(&pf, Some(token(TEXT))), [None; 2]);
        assert_eq!(refusals(&vf, Some(token(TEXT))), [None; 2]);
    }

    #[test]
    fn the_fake_parses_requests_as_linux_does() {
        let function = function(FunctionRole::Virtual(Some(physical(TEXT, 0))));
        let open = |request: String| {
            let request = std::ffi::CString::new(request).expect("no zero");
            let done = function.open(&request);
            done.err().and_then(|cause| cause.raw_os_error())
        };
        for (request, errno) in [
            (format!("{NAME} vf_token={TEXT}"), None),
            (format!("{NAME}  vf_token={TEXT} "), None),
            (format!("{NAME}1 vf_token={TEXT}"), Some(libc::ENODEV)),
            (format!("0000:05:10.0 vf_token={TEXT}"), Some(libc::ENODEV)),
            (format!("{NAME} token={TEXT}"), Some(libc::EINVAL)),
            (
                format!("{NAME} vf_token={}", &TEXT[1..]),
                Some(libc::EINVAL),
            ),
            (
                format!("{NAME} vf_token={TEXT} vf_token={TEXT}"),
                Some(libc::EINVAL),
            ),
            (
                format!("{NAME} vf_token={}", TEXT.replace('-', "0")),
                Some(libc::EINVAL),
            ),
        ] {
            assert_eq!(open(request.clone()), errno, "{request}");
        }
        let token = token(TEXT);
        let bind = |change: fn(&mut vfio_device_bind_iommufd)| {
            let mut argument = ioctl::bind_argument(3, Some(&token));
            change(&mut argument);
            let done = function.bind(&argument, &[token.as_bytes()]);
            done.err().and_then(|cause| cause.raw_os_error())
        };
        assert_eq!(bind(|_| ()), None);
        assert_eq!(bind(|it| it.argsz = 15), Some(libc::EINVAL));
        assert_eq!(bind(|it| it.argsz = 16), Some(libc::EFAULT));
        assert_eq!(bind(|it| it.flags |= 2), Some(libc::EINVAL));
        assert_eq!(bind(|it| it.flags = 0), Some(libc::EACCES));
        assert_eq!(bind(|it| it.iommufd = -1), Some(libc::EINVAL));
        assert_eq!(bind(|it| it.token_uuid_ptr += 1), Some(libc::EFAULT));
    }

    #[test]
    fn a_refusal_because_of_the_token_has_a_cure() {
        let cure = |errno, has_token| token_cure(&error(errno), has_token).unwrap_or_default();
        assert!(cure(libc::EACCES, false).contains("set `vf-token`"));
        assert!(cure(libc::EACCES, true).contains("the same `vf-token`"));
        assert!(cure(libc::EINVAL, true).contains("remove `vf-token`"));
        assert_eq!(cure(libc::EINVAL, false), "");
        assert_eq!(cure(libc::EBUSY, true), "");
    }

    #[test]
    fn no_form_of_a_device_shows_its_token() {
        let source = GroupSource {
            group: std::sync::Arc::new(fake::memfd(0)),
            name: c"0000:04:10.0".into(),
            token: Some(token(TEXT)),
        };
        let shown = format!("{source:?}");
        assert!(shown.contains("VfToken(..)"), "{shown}");
        assert!(!shown.contains(&TEXT[..8]), "{shown}");
    }
}
