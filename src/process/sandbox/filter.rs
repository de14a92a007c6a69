//! The seccomp filter of a thread, compiled from the system calls of its role.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::SandboxError;
use super::calls::{Argument, Call, Condition, calls};
use super::role::{Needs, Role};

/// The reaction to a call that the filter does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Violation {
    /// The kernel kills the process, with SIGSYS and at once.
    Kill,
    /// The thread names the call on standard error and then ends the process with SIGSYS.
    Report,
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// The filters of a thread, in the order in which they must be installed.
///
/// # Errors
/// The processor has no filters.
pub(super) fn programs(
    role: Role,
    needs: &Needs,
    violation: Violation,
) -> Result<Vec<BpfProgram>, SandboxError> {
    let arch = std::env::consts::ARCH;
    let arch = TargetArch::try_from(arch).map_err(|_| SandboxError::NoFilters {
        scope: format!("for the processor {arch}"),
    })?;
    let mut programs = Vec::new();
    if role.starts_threads(needs) {
        // A filter cannot check the arguments of clone3, because they are in memory. The C library uses clone
        // instead if clone3 gives ENOSYS.
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

/// The rules by call. If the list has a call both with and without a condition, the call is allowed with any
/// arguments.
fn rules(calls: &[Call]) -> Result<Rules, SandboxError> {
    let mut rules = Rules::new();
    for (number, _) in calls.iter().filter(|(_, a)| *a == Condition::Always) {
        rules.insert(*number, Vec::new());
    }
    for (number, allowed) in calls {
        let arguments = match allowed {
            Condition::Always => continue,
            Condition::With(argument) => vec![*argument],
            Condition::Both(one, other) => vec![*one, *other],
        };
        let rule = rule(&arguments)?;
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

/// The rule that all of these arguments are as they must be.
fn rule(arguments: &[Argument]) -> Result<SeccompRule, SandboxError> {
    let conditions = arguments.iter().copied().map(condition);
    conditions
        .collect::<Result<_, _>>()
        .and_then(SeccompRule::new)
        .map_err(SandboxError::Filter)
}

fn condition(argument: Argument) -> Result<SeccompCondition, seccompiler::BackendError> {
    let word = SeccompCmpArgLen::Dword;
    let (index, len, operator, value) = match argument {
        Argument::Is(index, value) => (index, word, SeccompCmpOp::Eq, value),
        Argument::HasAll(index, bits) => (index, word, SeccompCmpOp::MaskedEq(bits), bits),
        Argument::HasNone(index, bits) => (index, word, SeccompCmpOp::MaskedEq(bits), 0),
        Argument::HasPart(index, mask, part) => (index, word, SeccompCmpOp::MaskedEq(mask), part),
        Argument::IsNull(index) => (index, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0),
    };
    SeccompCondition::new(index, len, operator, value)
}

#[cfg(test)]
mod tests {
    use super::super::role::Plugging;
    use super::*;

    #[test]
    fn each_role_has_a_filter_and_roles_that_start_threads_have_two() {
        let needs = Needs::all_without_files();
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
    fn an_unconditional_rule_overrides_conditions() {
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
