//! Variants of the recorded failures, and the traps beside them: what each rule must hold for beyond its example. The
//! disk alone decides. What is expected follows `reference/systemd.md` and systemd's manual pages; unlike the recorded
//! failures, these trees were not booted (the refusals to load were checked with
//! `systemd-analyze --root verify` of systemd 252).
use super::{tree::Base, variants_programs::PROGRAMS, variants_units::UNITS};
use anyhow::Result;
use vestibule_diagnose::{Evidence, diagnose, disk::dir::DirTree};

/// What happens to the tree, and the cause that must be named; `healthy` for traps.
pub(crate) struct Variant(pub(crate) &'static str, pub(crate) &'static str);

pub(crate) const AGENT: &str = "vm-browser-agent.service";

#[rustfmt::skip]
const VARIANTS: &[Variant] = &[
    // enablement
    Variant("mv $W $S/multi-user.wants", "enablement-link-invalid"),
    Variant("ln -sf ../$SVC $W/$SVC", "healthy"),
    Variant("ln -sf /nowhere/$SVC $W/$SVC", "healthy"),
    Variant("rm $W/$SVC; ln -s $SVC $W/agent.service", "enablement-link-invalid"),
    Variant("mv $W/$SVC $W/$SVC.disabled", "enablement-link-invalid"),
    Variant("rm $W/$SVC; mkdir -p $S/graphical.target.wants; ln -s ../$SVC $S/graphical.target.wants/$SVC", "healthy"),
    Variant("rm $W/$SVC; mkdir -p $S/novnc.service.wants; ln -s ../$SVC $S/novnc.service.wants/", "healthy"),
    Variant("rm $W/$SVC; sed -i '/Unit/a Wants=vm-browser-agent.service' $S/novnc.service", "healthy"),
    Variant("rm $W/$SVC; sed -i '/Unit/a Wants=vm-browser-agent.service' $S/novnc.service; rm $W/novnc.service", "wanted-by-unreached-target"),
    Variant("rm $W/$SVC; mkdir -p $S/network-online.target.wants; ln -s ../$SVC $S/network-online.target.wants/; rm -f $W/*agent*; sed -i 's/network-online.target//' $U", "wanted-by-unreached-target"),
    Variant(": > $U", "unit-masked"),
    Variant("cp $U $R/usr/lib/systemd/system/; : > $U", "unit-masked"),
    Variant("mv $U $R/usr/lib/systemd/system/; rm $W/$SVC; ln -s /lib/systemd/system/$SVC $W/$SVC", "healthy"),
    Variant("mv $U $R/opt/$SVC; ln -s /opt/$SVC $U", "healthy"),
    Variant("mv $U $R/opt/$SVC; ln -s /opt/other.service $U", "unit-file-missing"),
    Variant("mv $U $S/agent-real.service; ln -s agent-real.service $U", "healthy"),
    Variant("printf '[Unit]\\nDescription=Kiosk\\nRequires=basic.target\\nAfter=basic.target\\nAllowIsolate=yes\\n' > $S/kiosk.target; ln -sf kiosk.target $S/default.target", "default-target-wrong"),
    Variant("printf '[Unit]\\nDescription=Kiosk\\nWants=multi-user.target\\n' > $S/kiosk.target; ln -sf kiosk.target $S/default.target", "healthy"),
    Variant("ln -sf /dev/null $S/default.target", "default-target-wrong"),
    Variant("rm $W/$SVC; mkdir -p $S/default.target.wants; ln -s ../$SVC $S/default.target.wants/", "healthy"),
    Variant(": > $R/etc/machine-id; rm $W/$SVC", "unit-not-enabled"),
    Variant("echo uninitialized > $R/etc/machine-id; echo LANG=C > $R/etc/locale.conf; echo 'disable *' > $R/usr/lib/systemd/system-preset/99-x.preset", "healthy"),
    Variant("echo uninitialized > $R/etc/machine-id; ln -s /dev/null $S/systemd-firstboot.service; rm $W/$SVC", "healthy"),
    Variant("mkdir -p $S-generators; printf '#!/bin/sh\\nearly=\"$2\"\\nln -s /dev/null \"$early/vm-browser-agent.service\"\\n' > $S-generators/x; chmod 755 $S-generators/x", "unit-masked"),
    Variant("mkdir -p $S-generators; printf '#!/bin/sh\\nln -s /dev/null \"$2/other.service\"\\n' > $S-generators/x; chmod 755 $S-generators/x", "healthy"),
    Variant("mkdir -p $S-generators; printf '#!/bin/sh\\nexec sleep 1000\\n' > $S-generators/x", "healthy"),
    Variant("mkdir -p $S-generators; printf '#!/bin/sh\\nwhile true; do sleep 1; done\\n' > $S-generators/x; chmod 755 $S-generators/x", "generator-hangs"),
    Variant("mkdir -p $S-generators; printf '#!/bin/sh\\nuntil [ -e /run/agent/ready ]; do sleep 1; done\\n' > $S-generators/x; chmod 755 $S-generators/x", "generator-hangs"),
    Variant("mkdir -p $S-generators; printf '#!/bin/sh\\nwhile [ ! -e /etc/passwd ]; do sleep 1; done\\n' > $S-generators/x; chmod 755 $S-generators/x", "healthy"),
    // What a generator or a SysV script starts is not on the disk: no cause, and no verdict that it is well either.
    Variant("rm $W/$SVC; mkdir -p $S-generators; printf '#!/bin/sh\\nln -s /etc/systemd/system/vm-browser-agent.service \"$1/multi-user.target.wants/\"\\n' > $S-generators/x; chmod 755 $S-generators/x", "unknown"),
    Variant("rm $W/$SVC; mkdir -p $S-generators; printf '#!/bin/sh\\n# not vm-browser-agent.service\\n' > $S-generators/x; chmod 755 $S-generators/x", "unit-not-enabled"),
    Variant("rm $W/$SVC $U; mkdir -p $R/etc/init.d $R/etc/rc3.d; printf '#!/bin/sh\\n' > $R/etc/init.d/vm-browser-agent; chmod 755 $R/etc/init.d/vm-browser-agent; ln -s ../init.d/vm-browser-agent $R/etc/rc3.d/S01vm-browser-agent", "unknown"),
    Variant("rm $W/$SVC $U; mkdir -p $R/etc/init.d; printf '#!/bin/sh\\n' > $R/etc/init.d/vm-browser-agent; chmod 755 $R/etc/init.d/vm-browser-agent", "unit-file-missing"),
    // waiting
    Variant("mkdir -p $S/service.d; printf '[Unit]\\nConditionPathExists=/etc/never\\n' > $S/service.d/x.conf", "condition-unmet"),
    Variant("mkdir -p $S/vm-.service.d; printf '[Unit]\\nConditionPathExists=/etc/never\\n' > $S/vm-.service.d/x.conf", "condition-unmet"),
    Variant("dropin c <<<$'[Unit]\\nConditionPathExists=!/etc/passwd'", "condition-unmet"),
    Variant("dropin c <<<$'[Unit]\\nConditionPathExists=|/etc/never\\nConditionPathExists=|/etc/passwd'", "healthy"),
    Variant("dropin c <<<$'[Unit]\\nConditionPathExists=/run/x/y'", "healthy"),
    Variant("rm -rf $R/lib/modules/* $R/usr/lib/modules/*; dropin c <<<$'[Unit]\\nConditionPathExists=/lib/modules/%v/x'", "healthy"),
    Variant("mkdir -p $S-generators; printf '#!/bin/sh\\nmkdir -p \"$1/vm-browser-agent.service.wants\"\\n' > $S-generators/x; chmod 755 $S-generators/x", "healthy"),
    Variant("dropin c <<<$'[Unit]\\nConditionPathExists=/etc/never\\nConditionPathExists='", "healthy"),
    Variant("dropin c <<<$'[Unit]\\nConditionVirtualization=container'", "condition-unmet"),
    Variant("dropin c <<<$'[Unit]\\nConditionKernelCommandLine=agent'", "condition-unmet"),
    Variant("dropin c <<<$'[Unit]\\nConditionArchitecture=arm64'", "condition-unmet"),
    Variant("dropin c <<<$'[Unit]\\nConditionFirstBoot=yes'", "condition-unmet"),
    Variant("dropin c <<<$'[Unit]\\nConditionDirectoryNotEmpty=/opt/vm-browser-agent'", "healthy"),
    Variant("dropin c <<<$'[Service]\\nExecCondition=/bin/false'", "condition-unmet"),
    Variant("sed -i 's/^\\[Unit\\]/[Unit]\\nBefore=basic.target/' $U", "ordering-cycle"),
    Variant("sed -i 's/^After=.*/& novnc.service/' $U; sed -i 's/^After=.*/After=vm-browser-agent.service/' $S/novnc.service", "ordering-cycle"),
    Variant("sed -i 's/^\\[Unit\\]/[Unit]\\nConflicts=getty@tty1.service/' $U", "healthy"),
    Variant("sed -i 's/^\\[Unit\\]/[Unit]\\nConflicts=vm-browser-agent.service/' $S/novnc.service; rm $W/novnc.service", "healthy"),
    Variant("printf '[Unit]\\n[Service]\\nType=oneshot\\nExecStart=/bin/sh -c \"sleep infinity\"\\n' > $S/setup.service; ln -s ../setup.service $W/; sed -i 's/^After=.*/& setup.service/' $U", "waits-for-unit"),
    Variant("printf '[Unit]\\n[Service]\\nType=oneshot\\nExecStart=/bin/sleep infinity\\n' > $S/setup.service; sed -i 's/^After=.*/& setup.service/' $U", "healthy"),
    Variant("printf '[Unit]\\n[Service]\\nType=notify\\nExecStart=/bin/sleep infinity\\n' > $S/setup.service; ln -s ../setup.service $W/; sed -i 's/^After=.*/& setup.service/' $U", "waits-for-unit"),
    Variant("printf '[Unit]\\n[Service]\\nExecStart=/bin/sleep infinity\\n' > $S/setup.service; ln -s ../setup.service $W/; sed -i 's/^After=.*/& setup.service/' $U", "healthy"),
    // network
    Variant("sed -i 's/^Address.*/DHCP=yes/; /Gateway/d' $R/etc/systemd/network/10-eth.network", "waits-for-network-online"),
    Variant("sed -i 's/^Address.*/DHCP=yes/; /Gateway/d' $R/etc/systemd/network/10-eth.network; ln -s /dev/null $S/systemd-networkd-wait-online.service", "healthy"),
    Variant("rm $R/etc/systemd/network/10-eth.network; printf '[Match]\\nName=ens3\\n[Network]\\nDHCP=yes\\n' > $R/etc/systemd/network/10-x.network", "waits-for-network-online"),
    Variant("sed -i 's/^Name=.*/Name=wlan*/' $R/etc/systemd/network/10-eth.network", "network-matches-no-link"),
    Variant("sed -i 's/^Name=.*/Type=ether/' $R/etc/systemd/network/10-eth.network", "healthy"),
    Variant("sed -i 's/^Name=.*/Driver=virtio_net/' $R/etc/systemd/network/10-eth.network", "healthy"),
    Variant("sed -i 's/^Name=.*/Type=wlan/' $R/etc/systemd/network/10-eth.network", "network-matches-no-link"),
    Variant("sed -i 's/^Address=.*/Address=10.0.2.77\\/24/' $R/etc/systemd/network/10-eth.network", "wrong-address"),
    // loading
    Variant("sed -i 's/^\\[Service\\]/[Service/' $U", "unit-file-unreadable"),
    Variant("printf 'Description=\\xe9\\n' >> $U", "unit-file-unreadable"),
    Variant("printf '# \\xe9\\n' >> $U", "healthy"),
    Variant("sed -i 's/^Type=.*/Type=oneshot/' $U", "unit-settings-refused"),
    Variant("dropin e <<<$'[Service]\\nExecStart=/bin/true'", "unit-settings-refused"),
    Variant("dropin e <<<$'[Service]\\nExecStart=\\nExecStart=/usr/bin/node /opt/vm-browser-agent/server.js'", "healthy"),
    Variant("dropin e <<<$'[Service]\\nExecStart='", "unit-without-exec"),
    Variant("sed -i 's/^Type=.*/Type=dbus/' $U", "unit-settings-refused"),
    Variant("sed -i 's#^ExecStart=.*#ExecStart=/usr/bin/node /opt/%Z/server.js#' $U", "exec-path-invalid"),
    Variant("sed -i 's#^ExecStart=.*#ExecStart=\"/usr/bin/node /opt/vm-browser-agent/server.js#' $U", "unit-without-exec"),
    Variant("sed -i 's#^ExecStart=.*#ExecStart=node /opt/vm-browser-agent/server.js#' $U", "healthy"),
    Variant("sed -i 's#^ExecStart=.*#ExecStart=-+/usr/bin/node /opt/vm-browser-agent/server.js#' $U", "healthy"),
    Variant("sed -i 's#^ExecStart=.*#ExecStart=nodejs20 x#' $U", "exec-missing"),
    Variant("sed -i 's#^WorkingDirectory=.*#WorkingDirectory=opt#' $U", "exec-path-invalid"),
    Variant("sed 's#^Restart=.*#Restart=no#' $U > $R/usr/lib/systemd/system/$SVC", "healthy"),
    // requirements
    Variant("sed -i 's/^\\[Service\\]/Requires=novnc.service\\n[Service]/' $U; ln -sf /dev/null $R/etc/systemd/system/novnc.service", "healthy"),
    Variant("sed -i 's/^\\[Service\\]/Requisite=migrate.service\\nAfter=migrate.service\\n[Service]/' $U; printf '[Service]\\nType=oneshot\\nRemainAfterExit=yes\\nExecStart=/bin/true\\n' > $S/migrate.service", "requisite-inactive"),
    Variant("sed -i 's/^\\[Service\\]/Requires=m.service\\nAfter=m.service\\n[Service]/' $U; printf '[Service]\\nType=oneshot\\nExecStart=/opt/none\\n' > $S/m.service", "required-unit-failed"),
    Variant("sed -i 's/^\\[Service\\]/Requires=m.service\\nAfter=m.service\\n[Service]/' $U; printf '[Service]\\nExecStart=/opt/none\\n' > $S/m.service", "healthy"),
    Variant("sed -i 's/^\\[Service\\]/Wants=m.service\\nAfter=m.service\\n[Service]/' $U; printf '[Service]\\nType=oneshot\\nExecStart=/bin/false\\n' > $S/m.service", "healthy"),
    Variant("sed -i 's/^\\[Service\\]/BindsTo=m.service\\nAfter=m.service\\n[Service]/' $U; printf '[Service]\\nType=oneshot\\nRemainAfterExit=yes\\nExecStart=/bin/true\\n' > $S/m.service", "healthy"),
    // exec
    Variant("printf '#!/bin/sh\\r\\nexec node x\\r\\n' > $A/start; chmod 755 $A/start; sed -i 's#^ExecStart=.*#ExecStart=/opt/vm-browser-agent/start#' $U", "exec-interpreter-missing"),
    Variant("printf '#!/usr/bin/env node20\\n' > $A/start; chmod 755 $A/start; sed -i 's#^ExecStart=.*#ExecStart=/opt/vm-browser-agent/start#' $U", "exec-interpreter-missing"),
    Variant("printf '#!/usr/bin/env node\\n' > $A/start; chmod 755 $A/start; sed -i 's#^ExecStart=.*#ExecStart=/opt/vm-browser-agent/start#' $U", "healthy"),
    Variant("printf '\\x7fELF\\x02\\x01\\x01\\0\\0\\0\\0\\0\\0\\0\\0\\0\\x02\\0\\xb7\\0\\x01\\0\\0\\0' > $A/start; head -c 200 /dev/zero >> $A/start; chmod 755 $A/start; sed -i 's#^ExecStart=.*#ExecStart=/opt/vm-browser-agent/start#' $U", "exec-wrong-architecture"),
    Variant(": > $A/start; chmod 755 $A/start; sed -i 's#^ExecStart=.*#ExecStart=/opt/vm-browser-agent/start#' $U", "exec-format"),
    Variant("ln -sf /opt/node20/bin/node $R/usr/bin/node", "exec-missing"),
    Variant("echo '/dev/vda2 /opt ext4 noexec,nofail 0 0' >> $R/etc/fstab; printf '#!/bin/sh\\nexec node x\\n' > $A/start; chmod 755 $A/start; sed -i 's#^ExecStart=.*#ExecStart=/opt/vm-browser-agent/start#' $U", "exec-not-executable"),
    Variant("sed -i 's/^User=.*/User=nobody/' $U; chmod 700 $R/usr/bin/node", "exec-not-executable"),
    Variant("sed -i 's/^User=.*/User=root\\nGroup=agents/' $U", "group-missing"),
    Variant("sed -i 's/^User=.*/SupplementaryGroups=video2/' $U", "group-missing"),
    Variant("sed -i 's/^User=.*/User=agent/' $U; echo 'u agent - - /opt' > $R/usr/lib/sysusers.d/agent.conf", "healthy"),
    Variant("sed -i 's/^User=.*/User=agent\\nDynamicUser=yes/' $U", "healthy"),
    Variant("sed -i 's#^WorkingDirectory=.*#WorkingDirectory=/var/lib/agent\\nStateDirectory=agent#' $U", "healthy"),
    Variant("sed -i 's#^WorkingDirectory=.*#WorkingDirectory=-/var/lib/agent#' $U", "healthy"),
    Variant("sed -i 's#^WorkingDirectory=.*#WorkingDirectory=/srv/agent#' $U; echo 'd /srv/agent 0755 root root' > $R/etc/tmpfiles.d/a.conf", "healthy"),
    Variant("dropin n <<<$'[Service]\\nReadWritePaths=/var/lib/agent'", "namespace-path-missing"),
    Variant("dropin n <<<$'[Service]\\nReadWritePaths=-/var/lib/agent'", "healthy"),
    Variant("dropin n <<<$'[Service]\\nBindPaths=/srv/none:/opt/x'", "namespace-path-missing"),
    Variant("dropin n <<<$'[Service]\\nLoadCredential=token'", "healthy"),
    Variant("dropin n <<<$'[Service]\\nLoadCredential=token:/etc/none\\nSetCredential=token:x'", "healthy"),
    Variant("dropin n <<<$'[Service]\\nAppArmorProfile=-agent'", "healthy"),
    Variant("dropin n <<<$'[Service]\\nMemoryDenyWriteExecute=yes'", "memory-protection"),
    Variant("dropin n <<<$'[Service]\\nNoExecPaths=/\\nExecPaths=/usr'", "healthy"),
    Variant("sed -i 's#server.js#server2.js#' $U", "program-file-missing"),
    Variant("sed -i \"1i const e = require('express');\" $A/server.js", "program-file-missing"),
    Variant("sed -i \"1i const e = require('./lib');\" $A/server.js; echo > $A/lib.js", "healthy"),
    Variant("sed -i \"1i try { require('x'); } catch (e) {}\" $A/server.js", "healthy"),
    Variant("sed -i 's#^ExecStart=.*#ExecStart=/bin/true#; s/^Restart=.*/Restart=no/' $U", "exited-cleanly"),
    Variant("sed -i 's#^ExecStart=#ExecStartPre=/bin/true\\n&#' $U", "healthy"),
    Variant("sed -i 's#^ExecStart=#ExecStartPre=-/bin/false\\n&#' $U", "healthy"),
    Variant("sed -i 's#^ExecStart=#ExecStartPre=/bin/sh -c \"exit 3\"\\n&#' $U", "pre-start-failed"),
    Variant("sed -i 's#^ExecStart=#ExecStartPre=/opt/none\\n&#' $U", "exec-missing"),
    Variant("rm $R/usr/lib/x86_64-linux-gnu/libz.so.1*", "shared-library-missing"),
    Variant("mkdir $R/opt/lib; mv $R/usr/lib/x86_64-linux-gnu/libcares.so.2* $R/opt/lib; dropin l <<<$'[Service]\\nEnvironment=LD_LIBRARY_PATH=/opt/lib'", "healthy"),
    Variant("mkdir $R/opt/lib; mv $R/usr/lib/x86_64-linux-gnu/libcares.so.2* $R/opt/lib; echo /opt/lib > $R/etc/ld.so.conf.d/x.conf; ldconfig -r $R", "healthy"),
    // reach
    Variant("dropin p <<<$'[Service]\\nPrivateNetwork=yes'", "private-network"),
    Variant("dropin p <<<$'[Service]\\nIPAddressDeny=any'", "address-filtered"),
    Variant("dropin p <<<$'[Service]\\nIPAddressDeny=any\\nIPAddressAllow=10.0.2.0/24'", "healthy"),
    Variant("dropin p <<<$'[Service]\\nIPAddressDeny=any\\nIPAddressAllow=localhost'", "address-filtered"),
    Variant("dropin p <<<$'[Service]\\nRestrictAddressFamilies=AF_UNIX'", "address-filtered"),
    Variant("dropin p <<<$'[Service]\\nEnvironment=PORT=8080 HOST=0.0.0.0'", "healthy"),
    Variant("dropin p <<<$'[Service]\\nEnvironment=\"HOST=localhost\"'", "listens-on-loopback"),
    Variant("printf 'PORT=9090\\n' > $R/etc/agent.env; dropin p <<<$'[Service]\\nEnvironmentFile=/etc/agent.env'", "listens-on-wrong-port"),
    Variant("printf 'export FOO=1\\n' > $R/etc/agent.env; dropin p <<<$'[Service]\\nEnvironmentFile=/etc/agent.env'", "healthy"),
    Variant("printf '[Socket]\\nListenStream=8080\\n' > $S/other.socket; printf '[Service]\\nExecStart=/bin/cat\\n' > $S/other.service; mkdir -p $S/sockets.target.wants; ln -s ../other.socket $S/sockets.target.wants/", "port-in-use"),
    Variant("sed -i 's/policy drop/&/' $R/etc/nftables.conf; systemctl -q --root=$R enable nftables.service", "healthy"),
    Variant("printf 'table inet f { chain input { type filter hook input priority 0; policy drop; tcp dport { 22, 8080 } accept; } }\\n' > $R/etc/nftables.conf; systemctl -q --root=$R enable nftables.service", "healthy"),
    Variant("printf 'table inet f { chain input { type filter hook input priority 0; policy drop; } }\\n' > $R/etc/nftables.conf", "healthy"),
    Variant("printf 'table inet f {\\n chain input {\\n  type filter hook input priority 0;\\n  tcp dport 8080 reject\\n }\\n}\\n' > $R/etc/nftables.conf; systemctl -q --root=$R enable nftables.service", "firewall-drops"),
    // boot
    Variant("echo 'UUID=aaaa-bbbb /data ext4 defaults 0 2' >> $R/etc/fstab", "mount-device-missing"),
    Variant("echo '/dev/vdb /data ext4 nofail 0 2' >> $R/etc/fstab", "healthy"),
    Variant("echo 'tmpfs /data tmpfs defaults 0 0' >> $R/etc/fstab", "healthy"),
    Variant("rm $R/usr/sbin/init", "init-missing"),
    Variant("printf '/dev/vda / ext4 ro 0 1\\n' > $R/etc/fstab", "root-read-only"),
];

/// All of them.
fn all() -> impl Iterator<Item = &'static Variant> {
    VARIANTS.iter().chain(UNITS).chain(PROGRAMS)
}

/// The scripts of those that are healthy.
pub(crate) fn healthy() -> impl Iterator<Item = &'static str> {
    let healthy = all().filter(|variant| variant.1 == "healthy");
    healthy.map(|variant| variant.0)
}

/// Each of `variants` in a tree of its own: what happens to it, words added to the command line, and what must be named.
/// `VESTIBULE_VARIANT` leaves those whose script contains it.
pub(crate) fn judge<'v>(
    base: &Base,
    tools: &str,
    variants: impl Iterator<Item = (&'v str, &'v str, &'v str)>,
) -> Result<()> {
    let only = std::env::var("VESTIBULE_VARIANT").unwrap_or_default();
    let (mut tried, mut wrong) = (0, Vec::new());
    for (script, words, expected) in variants.filter(|(script, ..)| script.contains(&only)) {
        tried += 1;
        let mutated = base.script(&format!("{tools}{script}"))?;
        let root = if words.contains("root=") {
            ""
        } else {
            "root=/dev/vda"
        };
        let cmdline = format!("console=ttyS0 {root} rw net.ifnames=0 {words}");
        let evidence = Evidence::new().unit(AGENT).cmdline(cmdline);
        let verdict = diagnose(&evidence.disk(DirTree::new(&mutated.dir)));
        let got = crate::short(&verdict);
        if got != expected {
            let why = verdict
                .finding
                .map_or_else(String::new, |f| format!("{} {:?}", f.why, f.evidence));
            wrong.push(format!(
                "expected {expected}, got {got}: {script} {words}\n    {why}"
            ));
        }
    }
    println!("{tried} variants, {} wrong", wrong.len());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

#[test]
fn variants_of_the_failures_are_named() -> Result<()> {
    let Some((_, base)) = crate::faults("variants")? else {
        return Ok(());
    };
    judge(&base, "", all().map(|v| (v.0, "", v.1)))
}
