//! Splits QEMU's arguments, and its files of options, into options and their properties.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::Value;
use thiserror::Error;

use crate::topology::PciAddress;

/// Options of QEMU without a value. The argument after any other option is its value, whatever it looks like.
const FLAGS: [&str; 31] = [
    "S",
    "async-teardown",
    "daemonize",
    "enable-kvm",
    "enable-sync-profile",
    "full-screen",
    "h",
    "help",
    "jitdump",
    "mem-prealloc",
    "no-acpi",
    "no-fd-bootchk",
    "no-hpet",
    "no-reboot",
    "no-shutdown",
    "no-user-config",
    "nodefaults",
    "nographic",
    "one-insn-per-tb",
    "only-migratable",
    "perfmap",
    "portrait",
    "preconfig",
    "s",
    "show-cursor",
    "singlestep",
    "snapshot",
    "usb",
    "version",
    "win2k-hack",
    "xen-attach",
];
/// The largest file of `-readconfig`, in bytes.
const MAX_CONFIG: u64 = 1 << 20;

/// A file of QEMU options that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "the file {path:?} of -readconfig cannot be read, so `launch` cannot check its options ({why}); give them as \
     arguments"
)]
pub struct ReadConfigError {
    /// The path.
    pub path: String,
    /// The reason.
    pub why: String,
}

/// An option and the properties in its value. The first property of a value may have no name; here its name is
/// empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct VmmOption {
    /// The name, without dashes.
    pub name: String,
    pub properties: Vec<(String, String)>,
}

impl VmmOption {
    /// The last value of a property: QEMU uses that one.
    pub fn get(&self, key: &str) -> Option<&str> {
        let found = self.properties.iter().rfind(|(name, _)| name == key);
        found.map(|(_, value)| value.as_str())
    }

    pub fn is_machine(&self) -> bool {
        matches!(&*self.name, "machine" | "M")
    }

    /// The type of a device or an object.
    pub fn driver(&self) -> Option<&str> {
        let named = ["driver", "qom-type", ""].into_iter();
        named.filter_map(|key| self.get(key)).next()
    }

    /// Whether this memory backend is memory that other processes can map.
    pub fn is_shared(&self) -> bool {
        let share = self.get("share").map(|value| !is_off(value));
        match self.driver() {
            // Shared unless the option says otherwise.
            Some("memory-backend-memfd" | "memory-backend-shm") => share.unwrap_or(true),
            _ => share.unwrap_or(false),
        }
    }

    /// The place at which `addr=` puts a device, if `bus=` names the bus with number `bus`.
    pub fn function_on(&self, bus: u8) -> Option<PciAddress> {
        let (device, function) = match self.get("addr")?.split_once('.') {
            Some((device, function)) => (device, function),
            None => (self.get("addr")?, "0"),
        };
        let number = |text: &str| u8::from_str_radix(text.trim_start_matches("0x"), 16).ok();
        PciAddress::new(0, bus, number(device)?, number(function)?)
    }

    /// The parts of a `-global DRIVER.PROPERTY=VALUE` or `-global driver=DRIVER,property=PROPERTY,value=VALUE`. QEMU
    /// ignores defaults of objects that are no devices, such as memory backends.
    pub fn global(&self) -> Option<Global<'_>> {
        if self.name != "global" {
            return None;
        }
        if let (Some(driver), Some(property)) = (self.get("driver"), self.get("property")) {
            let value = self.get("value").unwrap_or_default();
            return Some(Global {
                driver,
                property,
                value,
            });
        }
        let (name, value) = self.properties.first()?;
        let (driver, property) = name.split_once('.')?;
        Some(Global {
            driver,
            property,
            value,
        })
    }
}

/// A `-global`: the default of a property. It applies to the devices of a type and of the types derived from it. The
/// properties that a -device names have precedence over it, and so have those that `launch` gives to its own.
pub(super) struct Global<'a> {
    pub driver: &'a str,
    pub property: &'a str,
    pub value: &'a str,
}

/// An option as the operator writes it.
#[derive(Clone, Debug)]
pub(super) struct WrittenOption<'a> {
    /// The name, without dashes.
    pub name: String,
    /// The name, as it is written.
    pub written: &'a OsString,
    pub value: Option<&'a OsString>,
}

/// The options in `arguments`.
pub(super) fn split(arguments: &[OsString]) -> impl Iterator<Item = WrittenOption<'_>> {
    let mut arguments = arguments.iter();
    std::iter::from_fn(move || {
        loop {
            let written = arguments.next()?;
            let text = written.to_string_lossy();
            // QEMU accepts one dash or two.
            let Some(name) = text.strip_prefix('-') else {
                continue;
            };
            let name = name.strip_prefix('-').unwrap_or(name).to_owned();
            let is_flag = FLAGS.contains(&&*name);
            let value = if is_flag { None } else { arguments.next() };
            return Some(WrittenOption {
                name,
                written,
                value,
            });
        }
    })
}

/// The options in `arguments`, with those of files that `-readconfig` names, and with the properties that `-set` gives
/// them.
///
/// # Errors
/// A file cannot be read.
pub(super) fn parse(arguments: &[OsString]) -> Result<Vec<VmmOption>, ReadConfigError> {
    let mut options = Vec::new();
    let mut sets = Vec::new();
    for WrittenOption { name, value, .. } in split(arguments) {
        let value = value.map(|text| text.to_string_lossy());
        if name == "readconfig"
            && let Some(path) = &value
        {
            options.extend(read_config(path)?);
            continue;
        }
        if name == "set"
            && let Some(value) = &value
        {
            sets.extend(Set::parse(value));
            continue;
        }
        let properties = value.map_or_else(Vec::new, |value| properties(&value));
        options.push(VmmOption { name, properties });
    }
    for set in sets {
        set.apply(&mut options);
    }
    Ok(options)
}

/// A `-set OPTION.ID.PROPERTY=VALUE`.
struct Set {
    option: String,
    id: String,
    property: (String, String),
}

impl Set {
    /// QEMU splits the text in the same way: the names of options and IDs have no dots. QEMU ends if this fails.
    fn parse(text: &str) -> Option<Self> {
        let (option, rest) = text.split_once('.')?;
        let (id, rest) = rest.split_once('.')?;
        let (key, value) = rest.split_once('=')?;
        Some(Self {
            option: option.to_owned(),
            id: id.to_owned(),
            property: (key.to_owned(), value.to_owned()),
        })
    }

    /// Changes the option. If the operator gives no such option, it may be one that `launch` adds: then the property
    /// stands alone, with the ID.
    fn apply(self, options: &mut Vec<VmmOption>) {
        let Self {
            option: name,
            id,
            property,
        } = self;
        let is_meant =
            |option: &&mut VmmOption| option.name == name && option.get("id") == Some(id.as_str());
        match options.iter_mut().find(is_meant) {
            Some(option) => option.properties.push(property),
            None => options.push(VmmOption {
                name,
                properties: vec![("id".to_owned(), id), property],
            }),
        }
    }
}

/// Whether a property that is on or off is off.
pub(super) fn is_off(value: &str) -> bool {
    matches!(value, "off" | "no" | "false" | "n" | "none")
}

/// The properties in an option's value: JSON, or `value,key=value,...` with each comma in a value doubled.
fn properties(value: &str) -> Vec<(String, String)> {
    if value.starts_with('{')
        && let Ok(Value::Object(keys)) = serde_json::from_str(value)
    {
        let text = |value: Value| match value {
            Value::String(text) => text,
            Value::Bool(on) => if on { "on" } else { "off" }.into(),
            other => other.to_string(),
        };
        return keys.into_iter().map(|(k, v)| (k, text(v))).collect();
    }
    let mut parts = vec![String::new()];
    let mut chars = value.chars().peekable();
    while let Some(c) = chars.next() {
        if c != ',' || chars.next_if_eq(&',').is_some() {
            if let Some(last) = parts.last_mut() {
                last.push(c);
            }
        } else {
            parts.push(String::new());
        }
    }
    let property = |(at, part): (usize, String)| match part.split_once('=') {
        Some((key, value)) => (key.trim().to_owned(), value.to_owned()),
        None if at == 0 => (String::new(), part),
        None => match part.strip_prefix("no") {
            Some(key) => (key.to_owned(), "off".to_owned()),
            None => (part, "on".to_owned()),
        },
    };
    parts.into_iter().enumerate().map(property).collect()
}

/// The options in a file of `-readconfig`: sections `[option "id"]` with lines `key = "value"`.
fn read_config(path: &str) -> Result<Vec<VmmOption>, ReadConfigError> {
    let fail = |why: String| ReadConfigError {
        path: path.to_owned(),
        why,
    };
    let file = File::open(Path::new(path)).map_err(|cause| fail(cause.to_string()))?;
    // A pipe or a device could keep this process waiting, and QEMU could read another content.
    if !file.metadata().is_ok_and(|found| found.is_file()) {
        return Err(fail("it is not a regular file".into()));
    }
    let mut text = String::new();
    let read = file.take(MAX_CONFIG + 1).read_to_string(&mut text);
    let length = read.map_err(|cause| fail(cause.to_string()))?;
    if length as u64 > MAX_CONFIG {
        return Err(fail(format!("it has more than {MAX_CONFIG} bytes")));
    }
    let mut options: Vec<VmmOption> = Vec::new();
    for line in text.lines().map(str::trim) {
        if let Some(head) = line.strip_prefix('[').and_then(|it| it.strip_suffix(']')) {
            let (name, id) = head.split_once(char::is_whitespace).unwrap_or((head, ""));
            let id = id.trim().trim_matches('"').to_owned();
            let named = (!id.is_empty()).then(|| ("id".to_owned(), id));
            options.push(VmmOption {
                name: name.to_owned(),
                properties: named.into_iter().collect(),
            });
        } else if !line.starts_with('#')
            && let Some((key, value)) = line.split_once('=')
            && let Some(option) = options.last_mut()
        {
            let value = value.trim().trim_matches('"').to_owned();
            option.properties.push((key.trim().to_owned(), value));
        }
    }
    Ok(options)
}
