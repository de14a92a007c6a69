//! What a later process makes of a file, and of the endpoints that were added and removed.

use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::ids::EndpointId;

const FILE: &str = "socket = '/s'\ncontrol = '/c'\naddress = '00:05.0'\nhotplug = ['01:00.0-01:1f.7']\n\
     [[endpoint]]\naddress = '00:06.0'\nvfio-user = { listen = '/l', connect = '/k' }\n\
     [[endpoint]]\nrange = '00:10.0-00:10.7'\ngroup = 'g'\n";

fn parse(text: &str) -> Config {
    Config::from_text(Path::new("vm.toml"), text).expect("a configuration")
}

fn range(text: &str) -> PciRange {
    text.parse().expect("a range")
}

/// A running VM: its configuration, and what differs from the file.
struct Running(Config, EndpointChanges);

impl Running {
    fn new(file: &Config) -> Self {
        Self(file.clone(), EndpointChanges::default())
    }

    fn add(&mut self, keys: &str) {
        let (with, range) = self.0.with_endpoint(keys).expect(keys);
        self.1.add(keys, range).expect("room");
        self.0 = with;
    }

    fn remove(&mut self, text: &str) {
        self.0 = self.0.without_endpoints(range(text)).expect(text);
        self.1.remove(range(text)).expect("room");
    }

    /// What a later process makes of it after a change of the file.
    fn next(&self, file: &Config) -> ChangedConfig {
        let json = serde_json::to_string(&self.1).expect("encoded");
        let changes: EndpointChanges = serde_json::from_str(&json).expect("decoded");
        assert_eq!(changes, self.1);
        changes.apply(file)
    }
}

fn summary(config: &Config) -> String {
    let ranges: Vec<_> = config.topology.ranges().map(|entry| entry.range).collect();
    format!("{ranges:?} {:?}", config.devices)
}

#[test]
fn a_later_process_has_the_same_endpoints() {
    let file = parse(FILE);
    let mut vm = Running::new(&file);
    let emulated = "vfio-user = { listen = '/m', connect = '/n' }";
    let exported = "vfio = '65:00.0', export = '/e'";
    for (is_added, text) in [
        (true, "range = '01:00.0-01:00.7'".to_owned()),
        (false, "01:00.3-01:00.4".into()),
        (true, "address = '01:00.4', group = 'n'".into()),
        (true, format!("address = '01:02.0', {emulated}")),
        (true, format!("address = '01:03.0', {exported}")),
        (false, "00:10.3".into()),
        (false, "00:10.4-00:10.5".into()),
        (false, "00:06.0".into()),
        (false, "01:00.4".into()),
        (true, "address = '00:06.0'".into()),
        (false, "01:03.0".into()),
        (false, "01:00.0-01:00.2".into()),
        (false, "01:00.5-01:00.7".into()),
    ] {
        if is_added {
            vm.add(&text);
        } else {
            vm.remove(&text);
        }
        let next = vm.next(&file);
        assert!(next.contradictions.is_empty(), "{:?}", next.contradictions);
        assert_eq!(summary(&next.whole), summary(&vm.0), "after {text}");
        assert_eq!(next.changes, vm.1);
    }
    // Nothing is left of endpoints that have come and gone.
    assert_eq!(vm.1.added.len(), 2, "{:?}", vm.1);
    assert_eq!(vm.1.removed.len(), 2, "{:?}", vm.1);
}

#[test]
fn a_file_that_has_the_same_endpoint_is_no_contradiction() {
    let keys = "address = '01:02.0', vfio-user = { listen = '/m', connect = '/n' }";
    let mut vm = Running::new(&parse(FILE));
    vm.add(keys);
    let same = parse(&format!(
        "{FILE}[[endpoint]]\n{}",
        keys.replacen(", ", "\n", 1)
    ));
    let next = vm.next(&same);
    assert!(next.contradictions.is_empty());
    assert_eq!(summary(&next.whole), summary(&vm.0));
    assert_eq!(next.changes, vm.1, "it is still an addition");
}

#[test]
fn a_file_that_has_another_endpoint_there_contradicts() {
    let mut vm = Running::new(&parse(FILE));
    vm.add("address = '01:02.0', vfio-user = { listen = '/m', connect = '/n' }");
    vm.add("address = '01:03.0'");
    for (other, why) in [
        ("address = '01:02.0'", "overlap"),
        ("range = '01:01.0-01:02.3'", "overlap"),
        (
            "address = '01:04.0'\nvfio-user = { listen = '/m', connect = '/o' }",
            "another path",
        ),
    ] {
        let file = parse(&format!("{FILE}[[endpoint]]\n{other}\n"));
        let next = vm.next(&file);
        let [contradiction] = next.contradictions.as_slice() else {
            panic!("{other}: {:?}", next.contradictions);
        };
        assert_eq!(contradiction.range, range("01:02.0"));
        let text = contradiction.to_string();
        assert!(text.contains(why), "{text}");
        // The other one is there.
        assert_eq!(next.changes.added().len(), 1);
        assert!(
            next.whole
                .topology
                .check_within_one_range(range("01:03.0"))
                .is_ok()
        );
    }
}

#[test]
fn removals_that_the_file_has_made_are_forgotten() {
    let mut vm = Running::new(&parse(FILE));
    vm.remove("00:06.0");
    vm.remove("00:10.2-00:10.5");
    let gone = parse("socket = '/s'\naddress = '00:05.0'\n[[endpoint]]\naddress = '00:10.3'\n");
    let next = vm.next(&gone);
    assert_eq!(next.file.topology.endpoint_count(), 0);
    assert_eq!(next.changes.removed, [TextRange(range("00:10.3"))]);
    // The guest was offered what all of them can, in each later life, too.
    let none = parse("socket = '/s'\naddress = '00:05.0'\n");
    let mut changes = vm.next(&none).changes;
    for _ in 0..2 {
        assert_eq!(changes.removed, []);
        assert!(changes.has_removals());
        let text = serde_json::to_string(&changes).expect("text");
        changes = serde_json::from_str(&text).expect("changes");
        changes = changes.apply(&none).changes;
    }
    assert!(
        !EndpointChanges::default()
            .apply(&none)
            .changes
            .has_removals()
    );
    // Also if the file has several endpoints where one was.
    let split = parse(&format!(
        "{}[[endpoint]]\naddress = '00:10.3'\n[[endpoint]]\nrange = '00:10.5-00:10.6'\n",
        FILE.replace("00:10.0-00:10.7", "00:10.0-00:10.2")
    ));
    let next = vm.next(&split);
    assert_eq!(next.file.topology.endpoint_count(), 3);
    assert_eq!(next.changes.removed.len(), 3);
}

#[test]
fn changes_have_a_limit() {
    let mut changes = EndpointChanges::default();
    let function = |n: usize| {
        let (bus, device) = (n / 32, n % 32);
        range(&format!("{bus:02x}:{device:02x}.0"))
    };
    for n in 0..MAX_CHANGES {
        changes.add("", function(n)).expect("room");
    }
    let full = changes.clone();
    assert_eq!(changes.add("", range("ff:00.0")), Err(TooManyChanges));
    assert_eq!(changes.remove(range("ff:00.0")), Err(TooManyChanges));
    assert_eq!(changes, full);
    changes.remove(function(3)).expect("one less");
    changes.remove(range("ff:00.0")).expect("room");
}

proptest! {
    /// Whatever the text says, the configuration is the file's with some endpoints more or less.
    #[test]
    fn any_changes_are_applied_or_refused(
        keys in prop::collection::vec("(address = '0[0-2]:0[0-9].[0-2]'(, group = 'g')?|.{0,30})", 0..5),
        removed in prop::collection::vec((0u32..600, 0u32..20), 0..5),
    ) {
        let file = parse(FILE);
        let mut changes = EndpointChanges::default();
        for (first, more) in removed {
            let [first, last] = [first, first + more].map(|id| PciAddress::from_endpoint_id(EndpointId(id)));
            changes.remove(PciRange::new(first, last).expect("a range")).expect("room");
        }
        for keys in &keys {
            changes.add(keys, range("01:00.0")).expect("room");
        }
        let applied = changes.apply(&file);
        let count = applied.changes.added().len() + applied.contradictions.len();
        prop_assert_eq!(count, changes.added().len());
        let whole = applied.whole;
        prop_assert_eq!(whole.topology.iommu(), file.topology.iommu());
        prop_assert_eq!(whole.control, file.control);
    }
}
