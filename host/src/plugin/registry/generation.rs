//! One version of a plugin at work, and the chain of all that are, at one moment.

use std::sync::Arc;
use std::time::Instant;

use super::health::{Health, Report};
use super::settings::Settings;
use crate::event::Name;
use crate::plugin::{Plugin, Role};

/// One version of one plugin, under one configuration.
#[derive(Debug)]
pub struct Generation {
    pub plugin: Plugin,
    /// 1 for the first of this name in this process.
    pub number: u64,
    pub settings: Settings,
    /// Of each role that it has: a filter that keeps everything must not hide a router that always fails.
    filter: Option<Health>,
    router: Option<Health>,
}

impl Generation {
    /// `is_on_probation`: another generation could take its place.
    pub(in crate::plugin) fn new(
        plugin: Plugin,
        number: u64,
        settings: Settings,
        is_on_probation: bool,
        now: Instant,
    ) -> Self {
        let of = |role| {
            plugin
                .has_role(role)
                .then(|| Health::new(settings.tolerance(), is_on_probation, now))
        };
        Self {
            filter: of(Role::Filter),
            router: of(Role::Router),
            plugin,
            number,
            settings,
        }
    }

    /// # Panics
    /// If the plugin has no such role.
    pub(crate) fn health(&self, role: Role) -> &Health {
        let health = match role {
            Role::Filter => &self.filter,
            Role::Router => &self.router,
        };
        health
            .as_ref()
            .expect("a plugin is asked in roles that it has")
    }

    fn healths(&self) -> impl Iterator<Item = &Health> {
        self.filter.iter().chain(&self.router)
    }

    /// Ends the probation: what it could be rolled back to is no more.
    pub(in crate::plugin) fn end_probation(&self) {
        self.healths().for_each(Health::end_probation);
    }

    /// Whether nothing is held against it: its probation, if it had one, is over.
    pub(in crate::plugin) fn is_proven(&self, now: Instant) -> bool {
        self.healths().all(|health| health.is_proven(now))
    }

    /// How it fares in the role in which it fares worse.
    pub(in crate::plugin) fn report(&self, now: Instant) -> Report {
        self.healths()
            .map(|health| health.report(now))
            .max_by_key(Report::trouble)
            .unwrap_or_default()
    }
}

/// All plugins at work, at one moment. Whoever holds one finishes on it.
#[derive(Debug, Default)]
pub struct Chain {
    /// In the order in which they are asked. A plugin that is filter and router is in both.
    pub filters: Vec<Arc<Generation>>,
    pub routers: Vec<Arc<Generation>>,
}

impl Chain {
    /// Of these, in their order.
    pub(in crate::plugin) fn new<'a>(
        generations: impl Iterator<Item = &'a Arc<Generation>> + Clone,
    ) -> Self {
        let of_role = |role| {
            generations
                .clone()
                .filter(|generation| generation.plugin.has_role(role))
                .cloned()
                .collect()
        };
        Self {
            filters: of_role(Role::Filter),
            routers: of_role(Role::Router),
        }
    }

    /// With this generation in the place of that of its name.
    pub(in crate::plugin) fn with(&self, other: &Arc<Generation>) -> Self {
        let in_place = |generation: &Arc<Generation>| {
            let is_its = generation.plugin.name() == other.plugin.name();
            Arc::clone(if is_its { other } else { generation })
        };
        Self {
            filters: self.filters.iter().map(in_place).collect(),
            routers: self.routers.iter().map(in_place).collect(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.filters.is_empty() && self.routers.is_empty()
    }

    /// Each plugin once.
    pub(in crate::plugin) fn generations(&self) -> impl Iterator<Item = &Arc<Generation>> {
        self.filters.iter().chain(
            self.routers
                .iter()
                .filter(|generation| !generation.plugin.has_role(Role::Filter)),
        )
    }

    /// Whether this generation is of this chain.
    pub(crate) fn has(&self, name: &Name, number: u64) -> bool {
        self.generations()
            .any(|generation| generation.plugin.name() == name && generation.number == number)
    }
}
