//! The one target of all devices in a host group.

use super::Target;

/// The target that a group gets. `members` has, for each member, its wanted target and whether it is quarantined.
/// Members with target [`Target::Blocked`] do not count. Two members with different targets, or one quarantined member,
/// block the whole group, because the host cannot tell their DMA apart.
pub(super) fn common_target(members: impl Iterator<Item = (Target, bool)> + Clone) -> Target {
    if members.clone().any(|(_, quarantined)| quarantined) {
        return Target::Blocked;
    }
    let mut targets = members
        .map(|(wanted, _)| wanted)
        .filter(|target| *target != Target::Blocked);
    match targets.next() {
        Some(target) if targets.all(|other| other == target) => target,
        Some(_) | None => Target::Blocked,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::DomainId;

    #[test]
    fn members_that_agree_set_the_target_of_their_group() {
        use Target::{Blocked, Bypass};
        let (one, two) = (Target::Domain(DomainId(1)), Target::Domain(DomainId(2)));
        let common = |members: &[(Target, bool)]| common_target(members.iter().copied());
        assert_eq!(common(&[]), Blocked);
        assert_eq!(common(&[(one, false)]), one);
        assert_eq!(common(&[(one, false), (one, false), (Blocked, false)]), one);
        assert_eq!(common(&[(one, false), (two, false)]), Blocked);
        assert_eq!(common(&[(Bypass, false), (one, false)]), Blocked);
        assert_eq!(common(&[(Bypass, false), (Bypass, true)]), Blocked);
    }
}
