//! Values as a file or options give them, before any check.

use std::fmt;
use std::ops::Range;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use toml::Spanned;

use super::error::ProblemKind;
use crate::args::{OnOff, RunArgs};
use crate::topology::ports::Place;

/// Where a value comes from: bytes of the file, or an option.
#[derive(Clone, Debug)]
pub(super) enum Origin {
    File(Range<usize>),
    Flag(&'static str),
}

/// A value and where it comes from.
#[derive(Clone, Debug)]
pub(super) struct Located<T> {
    pub value: T,
    pub origin: Origin,
}

impl<T> Located<T> {
    fn flag(name: &'static str, value: T) -> Self {
        Self {
            value,
            origin: Origin::Flag(name),
        }
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Located<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<T>::deserialize(deserializer)?;
        Ok(Self {
            origin: Origin::File(spanned.span()),
            value: spanned.into_inner(),
        })
    }
}

/// A single value of any type. The check of its key checks the type.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Scalar {
    Integer(i128),
    Bool(bool),
    Text(String),
    Other(&'static str),
}

impl Scalar {
    /// The type, as a message names it.
    pub fn found(&self) -> &'static str {
        match self {
            Self::Integer(_) => "a number",
            Self::Bool(_) => "true or false",
            Self::Text(_) => "a text",
            Self::Other(name) => name,
        }
    }
}

impl<'de> Deserialize<'de> for Scalar {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AnyValue;

        impl<'de> Visitor<'de> for AnyValue {
            type Value = Scalar;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value")
            }

            fn visit_bool<E>(self, value: bool) -> Result<Scalar, E> {
                Ok(Scalar::Bool(value))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Scalar, E> {
                Ok(Scalar::Integer(value.into()))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Scalar, E> {
                Ok(Scalar::Integer(value.into()))
            }

            fn visit_i128<E>(self, value: i128) -> Result<Scalar, E> {
                Ok(Scalar::Integer(value))
            }

            fn visit_u128<E>(self, value: u128) -> Result<Scalar, E> {
                Ok(Scalar::Integer(i128::try_from(value).unwrap_or(i128::MAX)))
            }

            fn visit_f64<E>(self, _: f64) -> Result<Scalar, E> {
                Ok(Scalar::Other("a fraction"))
            }

            fn visit_str<E>(self, value: &str) -> Result<Scalar, E> {
                Ok(Scalar::Text(value.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Scalar, A::Error> {
                while items.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Scalar::Other("a list"))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut items: A) -> Result<Scalar, A::Error> {
                while items.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Scalar::Other("a table or a date"))
            }
        }

        deserializer.deserialize_any(AnyValue)
    }
}

/// All keys of the file.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Draft {
    pub name: Option<Located<Scalar>>,
    pub socket: Option<Located<Scalar>>,
    pub vfio_user_socket: Option<Located<Scalar>>,
    pub socket_mode: Option<Located<Scalar>>,
    pub socket_group: Option<Located<Scalar>>,
    pub control: Option<Located<Scalar>>,
    pub control_mode: Option<Located<Scalar>>,
    pub control_group: Option<Located<Scalar>>,
    pub metrics: Option<Located<MetricsDraft>>,
    pub address: Option<Located<Scalar>>,
    pub address_width: Option<Located<Scalar>>,
    pub bypass: Option<Located<Scalar>>,
    pub granule: Option<Located<Scalar>>,
    pub domains: Option<Located<Scalar>>,
    pub batch: Option<Located<Scalar>>,
    pub fault_rate: Option<Located<Scalar>>,
    pub poll_max_us: Option<Located<Scalar>>,
    pub realtime_priority: Option<Located<Scalar>>,
    pub memory: Option<Located<Scalar>>,
    pub arena_limit: Option<Located<Scalar>>,
    pub machine: Option<Located<Scalar>>,
    pub host_iommu: Option<Located<Scalar>>,
    pub pin: Option<Located<Scalar>>,
    pub vfio_from: Option<Located<Scalar>>,
    pub vfio_helper: Option<Located<Scalar>>,
    pub hotplug: Option<Located<Vec<Located<Scalar>>>>,
    pub qmp: Option<Located<Scalar>>,
    pub readers: Option<Located<ReadersDraft>>,
    pub reserved: Option<Located<Vec<Located<RegionDraft>>>>,
    #[serde(default)]
    pub port: Vec<Located<PortDraft>>,
    #[serde(default)]
    pub endpoint: Vec<Located<EndpointDraft>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(
    deny_unknown_fields,
    rename_all = "kebab-case",
    expecting = "a table for each port: `[[port]]`, and under it `address = \"00:02.0\"`"
)]
pub(super) struct PortDraft {
    pub address: Option<Located<Scalar>>,
    pub kind: Option<Located<Scalar>>,
    pub reserve_buses: Option<Located<Scalar>>,
    pub hotplug: Option<Located<Scalar>>,
    pub speed: Option<Located<Scalar>>,
    pub width: Option<Located<Scalar>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(
    deny_unknown_fields,
    rename_all = "kebab-case",
    expecting = "a table: `[metrics]`, and under it `socket = \"/run/vm1/iommu-metrics.sock\"`"
)]
pub(super) struct MetricsDraft {
    pub socket: Option<Located<Scalar>>,
    pub mode: Option<Located<Scalar>>,
    pub group: Option<Located<Scalar>>,
    pub textfile: Option<Located<Scalar>>,
    pub interval_s: Option<Located<Scalar>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(
    deny_unknown_fields,
    rename_all = "kebab-case",
    expecting = "a table: `[readers]`, and under it `users = [1001]`"
)]
pub(super) struct ReadersDraft {
    pub users: Option<Located<Vec<Located<Scalar>>>>,
    pub patience_ms: Option<Located<Scalar>>,
    pub limit: Option<Located<Scalar>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(
    deny_unknown_fields,
    rename_all = "kebab-case",
    expecting = "a table such as { first = 0xfee00000, last = 0xfeefffff, kind = \"msi\" }"
)]
pub(super) struct RegionDraft {
    pub first: Option<Located<Scalar>>,
    pub last: Option<Located<Scalar>>,
    pub kind: Option<Located<Scalar>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(
    deny_unknown_fields,
    rename_all = "kebab-case",
    expecting = "a table for each endpoint: `[[endpoint]]`, and under it `address = \"00:10.0\"` or \
                 `range = \"00:10.0-00:1e.7\"`"
)]
pub(super) struct EndpointDraft {
    pub port: Option<Located<Scalar>>,
    pub address: Option<Located<Scalar>>,
    pub range: Option<Located<Scalar>>,
    pub device: Option<Located<Scalar>>,
    pub group: Option<Located<Scalar>>,
    pub vfio: Option<Located<Scalar>>,
    pub vf_token: Option<Located<Scalar>>,
    pub export: Option<Located<Scalar>>,
    pub registers: Option<Located<Scalar>>,
    pub allow_no_snoop: Option<Located<Scalar>>,
    pub vfio_user: Option<Located<EmulatedDraft>>,
    pub shadow: Option<Located<Scalar>>,
    pub reserved: Option<Located<Vec<Located<RegionDraft>>>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(
    deny_unknown_fields,
    rename_all = "kebab-case",
    expecting = "a table such as { listen = \"/run/vm0/nvme-iommu.sock\", connect = \"/run/vm0/nvme.sock\" }"
)]
pub(super) struct EmulatedDraft {
    pub listen: Option<Located<Scalar>>,
    pub connect: Option<Located<Scalar>>,
    pub isolation: Option<Located<Scalar>>,
    pub announce: Option<Located<Scalar>>,
    pub max_windows: Option<Located<Scalar>>,
    pub deadline_ms: Option<Located<Scalar>>,
    pub total_deadline_ms: Option<Located<Scalar>>,
    pub connect_deadline_ms: Option<Located<Scalar>>,
}

impl EndpointDraft {
    /// Replaces the place behind a port by the address on the port's bus.
    pub fn put_on_bus(&mut self, bus: u8, first: Place, last: Place) {
        let (first, last) = (first.on_bus(bus), last.on_bus(bus));
        if let Some(given) = &mut self.range
            && self.address.is_none()
        {
            given.value = Scalar::Text(format!("{first}-{last}"));
            return;
        }
        let given = self.address.as_ref().or(self.port.as_ref());
        self.address = given.map(|given| Located {
            value: Scalar::Text(first.to_string()),
            origin: given.origin.clone(),
        });
    }

    /// The key that decides on the place of the endpoint.
    pub fn place_key(&self) -> &'static str {
        match (&self.port, &self.address) {
            (Some(_), _) => "port",
            (None, Some(_)) => "address",
            (None, None) => "range",
        }
    }
}

impl Draft {
    /// This draft, overridden by the options. Calls `refuse` for each option that cannot be read.
    pub fn overridden_by(
        mut self,
        args: &RunArgs,
        mut refuse: impl FnMut(&'static str, ProblemKind),
    ) -> Self {
        let path = |name, path: &Option<std::path::PathBuf>| {
            path.as_ref().map(|path| {
                let text = path.to_str().map(str::to_owned);
                Located::flag(
                    name,
                    text.map_or(Scalar::Other("a path outside UTF-8"), Scalar::Text),
                )
            })
        };
        let text = |name, text: &Option<String>| {
            text.as_ref()
                .map(|text| Located::flag(name, Scalar::Text(text.clone())))
        };
        fn replace<T>(old: &mut Option<T>, new: Option<T>) {
            if new.is_some() {
                *old = new;
            }
        }

        replace(&mut self.socket, path("--socket-path", &args.socket_path));
        replace(
            &mut self.control,
            path("--control-path", &args.control_path),
        );
        replace(&mut self.address, text("--iommu", &args.iommu));
        replace(
            &mut self.address_width,
            args.address_width
                .map(|bits| Located::flag("--address-width", Scalar::Integer(bits.into()))),
        );
        replace(
            &mut self.bypass,
            args.bypass
                .map(|value| Located::flag("--bypass", Scalar::Bool(value == OnOff::On))),
        );
        replace(&mut self.granule, text("--granule", &args.granule));
        replace(&mut self.machine, text("--machine", &args.machine));
        replace(&mut self.memory, text("--memory", &args.memory));
        replace(
            &mut self.arena_limit,
            text("--arena-limit", &args.arena_limit),
        );
        if args.no_reserved {
            self.reserved = Some(Located::flag("--no-reserved", Vec::new()));
        } else if !args.reserved.is_empty() {
            let mut regions = Vec::new();
            for text in &args.reserved {
                match RegionDraft::from_flag(text) {
                    Some(region) => regions.push(Located::flag("--reserved", region)),
                    None => refuse("--reserved", ProblemKind::RegionText(text.clone())),
                }
            }
            self.reserved = Some(Located::flag("--reserved", regions));
        }
        if !args.endpoint.is_empty() {
            self.endpoint = args
                .endpoint
                .iter()
                .map(|text| {
                    let range = Located::flag("--endpoint", Scalar::Text(text.clone()));
                    Located::flag(
                        "--endpoint",
                        EndpointDraft {
                            range: Some(range),
                            ..EndpointDraft::default()
                        },
                    )
                })
                .collect();
        }
        self
    }
}

impl RegionDraft {
    /// Splits `FIRST..=LAST:KIND`.
    fn from_flag(text: &str) -> Option<Self> {
        let (bounds, kind) = text.rsplit_once(':')?;
        let (first, last) = bounds.split_once("..=")?;
        let part = |text: &str| {
            Some(Located::flag(
                "--reserved",
                Scalar::Text(text.trim().to_owned()),
            ))
        };
        Some(Self {
            first: part(first),
            last: part(last),
            kind: part(kind),
        })
    }
}
