//! Adds endpoints to a configuration, and removes them, while the VM runs.

use std::path::Path;

use super::checker::{Checker, SourceText};
use super::draft::{Draft, Origin};
use super::error::{ConfigError, Location, ProblemKind};
use super::passthrough::range_in;
use super::{Config, ConfiguredDevice, DeviceLists, Socket};
use crate::topology::{NoSuchEndpoints, PciRange};

impl Config {
    /// This configuration with the endpoint that `text` describes, and the endpoint's functions. The
    /// text has the keys of an `[[endpoint]]`, with commas between them in place of line feeds:
    /// `address = "00:07.0", group = "nic"`.
    ///
    /// # Errors
    /// The text cannot be used, or contradicts the configuration; the error lists every problem.
    pub fn with_endpoint(&self, text: &str) -> Result<(Self, PciRange), ConfigError> {
        let whole = format!("endpoint = [{{ {text} }}]");
        let mut checker = Checker::new(Some(SourceText {
            path: Path::new(""),
            text: &whole,
        }));
        let added = if text.chars().any(char::is_control) {
            checker.refuse(&Origin::File(0..0), "", ProblemKind::AdditionControl);
            Err(checker.finish())
        } else {
            checker
                .parse()
                .and_then(|draft| checker.addition(self, &draft))
        };
        added.map_err(|mut error| {
            for problem in &mut error.problems {
                if let Location::File { key, .. } = &mut problem.location {
                    let key = key.strip_prefix("endpoint[0]").unwrap_or(key);
                    problem.location = Location::Addition(key.trim_start_matches('.').to_owned());
                }
            }
            error
        })
    }

    /// The functions that `text` names, whatever else it says; `None` if it names none, or cannot be read.
    pub(super) fn range_of_addition(text: &str) -> Option<PciRange> {
        let whole = format!("endpoint = [{{ {text} }}]");
        let mut checker = Checker::new(Some(SourceText {
            path: Path::new(""),
            text: &whole,
        }));
        let draft = checker.parse().ok()?;
        let [given] = draft.endpoint.as_slice() else {
            return None;
        };
        let place = given.value.address.as_ref().or(given.value.range.as_ref());
        place.and_then(range_in)
    }

    /// This configuration without the endpoints in `range`, which must be one `[[endpoint]]` or a part
    /// of one.
    ///
    /// # Errors
    /// The range has functions that are no endpoints, or spans more than one `[[endpoint]]`.
    pub fn without_endpoints(&self, range: PciRange) -> Result<Self, NoSuchEndpoints> {
        let mut config = self.clone();
        config.topology.remove(range)?;
        config.devices.remove(range);
        Ok(config)
    }
}

impl Checker<'_> {
    fn addition(
        mut self,
        config: &Config,
        draft: &Draft,
    ) -> Result<(Config, PciRange), ConfigError> {
        let [given] = draft.endpoint.as_slice() else {
            self.refuse(&Origin::File(0..0), "", ProblemKind::AdditionNotOne);
            return Err(self.finish());
        };
        if let Some(port) = &given.value.port {
            self.refuse(
                &port.origin,
                "endpoint[0].port",
                ProblemKind::PortInAddition,
            );
            return Err(self.finish());
        }
        if let Some(device) = &given.value.device {
            self.refuse(
                &device.origin,
                "endpoint[0].device",
                ProblemKind::DeviceInAddition,
            );
            return Err(self.finish());
        }
        if let Some(token) = &given.value.vf_token {
            self.refuse(
                &token.origin,
                "endpoint[0].vf-token",
                ProblemKind::VfTokenInAddition,
            );
            return Err(self.finish());
        }
        let vmm = match &config.socket {
            Some(Socket::Path(path)) => Some(path),
            Some(Socket::Fd(_)) | None => None,
        };
        let known = &config.devices;
        let taken: Vec<_> = vmm
            .into_iter()
            .chain(config.control.iter())
            .chain(known.iter().filter_map(ConfiguredDevice::listens_at))
            .collect();

        let spec = self.endpoint(0, given);
        let passthrough = self.passthrough(draft);
        let shadow = self.shadow(draft, config.socket.as_ref(), config.control.as_ref());
        let emulated = self.emulated(draft, &taken);
        let servers = known.iter().filter_map(ConfiguredDevice::connects_to);
        let taken: Vec<_> = taken.iter().copied().chain(servers).collect();
        let exported = self.exported(draft, &taken);

        let mut made = config.clone();
        if let Some(spec) = &spec
            && let Err(cause) = made.topology.add(spec)
        {
            self.refuse_topology(draft, cause, config.machine);
        }
        if let Some(spec) = &spec
            && let Err(cause) = made.ports.check_added(spec.range)
        {
            let place = given.value.address.as_ref().or(given.value.range.as_ref());
            let origin = place.map_or(&given.origin, |place| &place.origin);
            let key = format!("endpoint[0].{}", given.value.place_key());
            self.refuse(origin, &key, ProblemKind::Port(cause));
        }
        let with_host = |host| known.passthrough.iter().find(|p| p.host == host);
        if let Some([new]) = passthrough.as_deref()
            && let Some(other) = with_host(new.host)
            && let Some(vfio) = &given.value.vfio
        {
            let kind = ProblemKind::HostTwice {
                host: new.host,
                other: other.endpoint,
            };
            self.refuse(&vfio.origin, "endpoint[0].vfio", kind);
        }
        let (Some(spec), true) = (spec, self.problems.is_empty()) else {
            return Err(self.finish());
        };
        made.devices.add(DeviceLists {
            passthrough: passthrough.unwrap_or_default(),
            exported: exported.unwrap_or_default(),
            emulated: emulated.unwrap_or_default(),
            shadow: shadow.unwrap_or_default(),
        });
        // The guest would not find the new device. The problems of other endpoints are not this one's.
        let known = config.slot_problems();
        let problems = made.slot_problems().into_iter();
        for problem in problems.filter(|problem| problem.is_fatal() && !known.contains(problem)) {
            self.refuse(
                &Origin::File(0..0),
                "",
                ProblemKind::Slot(problem.to_string()),
            );
        }
        if !self.problems.is_empty() {
            return Err(self.finish());
        }
        Ok((made, spec.range))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: &str = "socket = '/s'\ncontrol = '/c'\naddress = '00:05.0'\n\
         [[endpoint]]\naddress = '00:06.0'\nvfio-user = { listen = '/l', connect = '/k' }\n\
         [[endpoint]]\naddress = '00:07.0'\nvfio = '65:00.0'\nexport = '/e'\n\
         [[endpoint]]\nrange = '00:10.0-00:10.7'\ngroup = 'g'\n";

    fn parse(text: &str) -> Config {
        Config::from_text(Path::new("vm.toml"), text).expect("good")
    }

    #[test]
    fn an_added_endpoint_equals_one_in_the_file() {
        for keys in [
            "address = '00:08.0'",
            "range = '00:08.0-00:09.7'; group = 'n'; reserved = [{ first = 0, last = 0xfff }]",
            "address = '00:08.0'; group = 'g'",
            "address = '00:08.0'; vfio-user = { listen = '/m', connect = '/k', deadline-ms = 50 }",
            "address = '00:09.0'; vfio = '66:00.0'; export = '/f'",
            "address = '00:08.0'; shadow = '/h'",
        ] {
            let added = parse(BASE).with_endpoint(&keys.replace(';', ","));
            let (made, range) = added.expect(keys);
            // The same keys in a file, under their own [[endpoint]].
            let file = format!("{BASE}[[endpoint]]\n{}", keys.replace("; ", "\n"));
            assert_eq!(made, parse(&file), "{keys}");
            assert!(made.topology.check_within_one_range(range).is_ok());
            let back = made.without_endpoints(range).expect("there");
            let of = |config: &Config| config.summary().to_string();
            assert_eq!(
                of(&back).replace("groups: 2", "groups: 1"),
                of(&parse(BASE))
            );
        }
    }

    /// An endpoint without a device of the daemon depends on devices that the configuration does not have.
    #[test]
    fn a_function_beside_function_0_can_be_added() {
        let emulated = |address: &str, socket: &str| {
            format!("address = '{address}', vfio-user = {{ listen = '{socket}', connect = '/x' }}")
        };
        let mut config = parse(BASE);
        for keys in [
            emulated("00:06.1", "/m"),
            emulated("01:00.0", "/n"),
            emulated("01:00.3", "/o"),
            "address = '00:09.1'".into(),
        ] {
            let (made, _) = config.with_endpoint(&keys).expect(&keys);
            config = made;
        }
        // A function that is hidden already does not keep others out.
        let hidden = config.without_endpoints("01:00.0".parse().expect("a range"));
        let hidden = hidden.expect("there");
        assert!(hidden.with_endpoint("address = '00:0a.0'").is_ok());
        assert!(hidden.with_endpoint(&emulated("01:00.4", "/p")).is_err());
    }

    #[test]
    fn bad_additions_are_refused_with_a_cure() {
        for (keys, cure) in [
            ("", "give `address"),
            ("address = '00:06.0'", "overlap"),
            ("address = '00:05.0'", "IOMMU's own"),
            ("range = '00:0f.0-00:10.0'", "overlap"),
            ("address = '00:08.0', vfio = '65:00.0'", "00:07.0 already"),
            ("address = '00:08.0', shadow = '/c'", "use another path"),
            (
                "address = '00:08.0', vfio-user = { listen = '/l', connect = '/x' }",
                "another path",
            ),
            (
                "address = '00:08.0', vfio-user = { listen = '/e', connect = '/x' }",
                "another path",
            ),
            (
                "address = '00:08.0', vfio = '66:00.0', export = '/k'",
                "another path",
            ),
            ("address = '00:08.0', colour = 'red'", "unknown key"),
            ("address = '00:08.0' # a remark", "correct the TOML"),
            (
                "address = '00:08.0' }]\nsocket = '/t' #",
                "control character",
            ),
            (
                "address = '00:08.0' }, { address = '00:09.0'",
                "one endpoint",
            ),
            (
                "address = '00:08.1', vfio = '66:00.0', export = '/f'",
                "make the device at 0000:00:08.0 an endpoint",
            ),
            (
                "address = '00:1f.2', vfio-user = { listen = '/m', connect = '/x' }",
                "SATA controller",
            ),
            (
                "address = '00:00.0', vfio = '66:00.0', export = '/f'",
                "host bridge",
            ),
            (
                "address = '00:08.0', reserved = [{ first = 0xfee00000, last = 0xfee00fff }]",
                "default",
            ),
        ] {
            let error = parse(BASE).with_endpoint(keys).expect_err(keys);
            let message = error.to_string();
            assert!(message.contains(cure), "{keys}: {message}");
            assert!(!message.contains("endpoint[0]"), "{message}");
        }
    }
}
