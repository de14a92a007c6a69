//! A thread's seccomp filter: the program made of what its role may call.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::SandboxError;
use super::calls::{Argument, Call, Condition, calls};
use super::role::{Needs, Role};

/// What becomes of a process that makes a call it is not allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Violation {
    /// The kernel ends it at once, all threads of it, with SIGSYS.
    Kill,
    /// The thread says on standard error which call it was, and ends the process with SIGSYS.
    Report,
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// The filters of a thread, in the order in which they are to be installed.
///
/// # Errors
/// The processor is none that filters can be made for.
pub(super) fn programs(
    role: Role,
    needs: &Needs,
    violation: Violation,
) -> Result<Vec<BpfProgram>, SandboxError> {
    let arch = std::env::consts::ARCH;
    let arch = TargetArch::try_from(arch).map_err(|_| SandboxError::NoFilters {
        why: format!("for the processor {arch}"),
    })?;
    let mut programs = Vec::new();
    if role.makes_threads(needs) {
        // The arguments of clone3 are in memory, where no filter sees them. The C library takes
        // clone instead where the kernel is said not to know it.
        let hidden = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
        let unknown = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
        programs.push(program(hidden, SeccompAction::Allow, unknown, arch)?);
    }
    let refused = match violation {
        Violation::Kill => SeccompAction::KillProcess,
        Violation::Report => SeccompAction::Trap,
    };
    let rules = rules(&calls(role, needs))?;
    programs.push(program(rules, refused, SeccompAction::Allow, arch)?);
    Ok(programs)
}

fn program(
    rules: Rules,
    otherwise: SeccompAction,
    matched: SeccompAction,
    arch: TargetArch,
) -> Result<BpfProgram, SandboxError> {
    let filter = SeccompFilter::new(rules, otherwise, matched, arch);
    filter
        .and_then(BpfProgram::try_from)
        .map_err(SandboxError::Filter)
}

/// A call that is allowed at all under no condition is allowed under any.
fn rules(calls: &[Call]) -> Result<Rules, SandboxError> {
    let mut rules = Rules::new();
    for (number, _) in calls.iter().filter(|(_, a)| *a == Condition::Always) {
        rules.insert(*number, Vec::new());
    }
    for (number, allowed) in calls {
        let Condition::With(argument) = allowed else {
            continue;
        };
        let rule = rule(argument)?;
        match rules.get_mut(number) {
            Some(all) if all.is_empty() => {}
            Some(some) if some.contains(&rule) => {}
            Some(some) => some.push(rule),
            None => {
                rules.insert(*number, vec![rule]);
            }
        }
    }
    Ok(rules)
}

fn rule(argument: &Argument) -> Result<SeccompRule, SandboxError> {
    let (index, operator, value) = match *argument {
        Argument::Is(index, value) => (index, SeccompCmpOp::Eq, value),
        Argument::HasAll(index, bits) => (index, SeccompCmpOp::MaskedEq(bits), bits),
        Argument::HasNone(index, bits) => (index, SeccompCmpOp::MaskedEq(bits), 0),
    };
    let condition = SeccompCondition::new(index, SeccompCmpArgLen::Dword, operator, value);
    condition
        .and_then(|condition| SeccompRule::new(vec![condition]))
        .map_err(SandboxError::Filter)
}

#[cfg(test)]
mod tests {
    use super::super::role::Plugging;
    use super::*;

    #[test]
    fn each_role_has_a_filter_and_who_makes_threads_has_two() {
        let needs = Needs::most();
        let plugging = Needs {
            plugging: Some(Plugging::default()),
            ..needs.clone()
        };
        for role in Role::ALL {
            for violation in [Violation::Kill, Violation::Report] {
                for needs in [&needs, &plugging, &Needs::default()] {
                    let made = programs(role, needs, violation).expect("a filter");
                    let makers =
                        role == Role::Main || role == Role::Control && needs.plugging.is_some();
                    assert_eq!(made.len(), if makers { 2 } else { 1 });
                    // The kernel takes no more than 4096 instructions.
                    assert!(made.iter().all(|program| program.len() < 1000), "{role:?}");
                }
            }
        }
    }

    #[test]
    fn what_is_allowed_without_condition_needs_none() {
        let with = |value| (7, Condition::With(Argument::Is(0, value)));
        let made = rules(&[with(1), with(2), with(1)]).expect("rules");
        assert_eq!(made[&7].len(), 2);
        for calls in [
            [with(1), (7, Condition::Always)],
            [(7, Condition::Always), with(1)],
        ] {
            assert!(rules(&calls).expect("rules")[&7].is_empty());
        }
    }
}
