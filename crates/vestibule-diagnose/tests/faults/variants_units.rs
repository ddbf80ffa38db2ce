//! Variants of how units are found, checked and tied to each other. Those that were booted with systemd 252 say so.
use super::variants::Variant;

#[rustfmt::skip]
pub(crate) const UNITS: &[Variant] = &[
    // enablement
    Variant("rm $W/$SVC; mv $U $S/vm-browser-agent@.service; ln -s ../vm-browser-agent@.service $W/vm-browser-agent@.service", "template-without-instance"),
    Variant("rm $W/$SVC; mv $U $S/vm-browser-agent@.service", "template-without-instance"),
    Variant("mv $U $S/vm-browser-agent@.service", "unit-file-missing"),
    Variant("rm $W/$SVC; mv $U $S/vm-browser-agent@.service; ln -s ../vm-browser-agent@.service $W/vm-browser-agent@1.service", "unit-file-missing"),
    Variant("mkdir $S/multi-user.target.want; mv $W/$SVC $S/multi-user.target.want/", "enablement-link-invalid"),
    Variant("mkdir $S/multi-user.target.d; mv $W/$SVC $S/multi-user.target.d/", "enablement-link-invalid"),
    Variant("rm $W/$SVC; mkdir $S/service.d; printf '[Unit]\\n' > $S/service.d/$SVC.conf", "unit-not-enabled"),
    // A generator of a name that is masked before does not run (booted).
    Variant("mkdir -p $S-generators; printf '#!/bin/sh\\nln -s /dev/null \"$2/vm-browser-agent.service\"\\n' > $R/usr/lib/systemd/system-generators/zz; chmod 755 $R/usr/lib/systemd/system-generators/zz; ln -s /dev/null $S-generators/zz", "healthy"),
    Variant("mkdir -p $S-generators; printf '#!/bin/sh\\nln -s /dev/null \"$2/vm-browser-agent.service\"\\n' > $R/usr/lib/systemd/system-generators/zz; chmod 755 $R/usr/lib/systemd/system-generators/zz; echo > $S-generators/zz", "unit-masked"),
    // conditions (booted: a host's name, a distribution, a mount point, a variable)
    Variant("echo agent-7 > $R/etc/hostname; dropin x <<<$'[Unit]\\nConditionHost=kiosk-*'", "condition-unmet"),
    Variant("echo Kiosk-7 > $R/etc/hostname; dropin x <<<$'[Unit]\\nConditionHost=kiosk-*'", "healthy"),
    Variant("rm -f $R/etc/hostname; dropin x <<<$'[Unit]\\nConditionHost=kiosk-*'", "healthy"),
    Variant("dropin x <<<$'[Unit]\\nConditionOSRelease=ID=fedora'", "condition-unmet"),
    Variant("dropin x <<<$'[Unit]\\nConditionOSRelease=ID=debian \"VERSION_ID>=11\"'", "healthy"),
    Variant("dropin x <<<$'[Unit]\\nConditionOSRelease=ID=debian VERSION_ID<11'", "condition-unmet"),
    Variant("mkdir -p $R/mp; dropin x <<<$'[Unit]\\nConditionPathIsMountPoint=/mp'", "condition-unmet"),
    Variant("mkdir -p $R/mp; echo 'tmpfs /mp tmpfs defaults 0 0' >> $R/etc/fstab; dropin x <<<$'[Unit]\\nConditionPathIsMountPoint=/mp'", "healthy"),
    Variant("dropin x <<<$'[Unit]\\nConditionPathIsMountPoint=/sys\\nConditionPathIsMountPoint=/'", "healthy"),
    Variant("dropin x <<<$'[Unit]\\nConditionEnvironment=AGENT=1'", "condition-unmet"),
    Variant("dropin x <<<$'[Unit]\\nConditionEnvironment=root=/dev/vda\\nConditionEnvironment=!AGENT\\nConditionEnvironment=LANG'", "healthy"),
    Variant("mkdir -p $R/etc/systemd/system.conf.d; printf '[Manager]\\nManagerEnvironment=AGENT=1\\n' > $R/etc/systemd/system.conf.d/x.conf; dropin x <<<$'[Unit]\\nConditionEnvironment=AGENT=1'", "healthy"),
    Variant("dropin x <<<$'[Unit]\\nConditionSecurity=selinux'", "condition-unmet"),
    Variant("dropin a <<<$'[Unit]\\nConditionPathExists=/etc/never'; dropin b <<<$'[Unit]\\nConditionHost='", "healthy"),
    // requirements (booted: the first of each)
    Variant("dropin x <<<$'[Unit]\\nBindsTo=xorg.service\\nAfter=xorg.service'", "required-unit-missing"),
    Variant("dropin x <<<$'[Unit]\\nBindsTo=xorg.service\\nAfter=xorg.service'; ln -s /dev/null $S/xorg.service", "required-unit-masked"),
    Variant("dropin x <<<$'[Unit]\\nRequires=xorg.service\\nAfter=xorg.service'", "healthy"),
    Variant("dropin x <<<$'[Unit]\\nRequisite=xorg.service\\nAfter=xorg.service'", "healthy"),
    Variant("dropin x <<<$'[Unit]\\nRequires=m.service\\nAfter=m.service'; printf '[Unit]\\nAssertPathExists=/etc/never\\n[Service]\\nType=oneshot\\nExecStart=/bin/true\\n' > $S/m.service", "required-unit-failed"),
    Variant("dropin x <<<$'[Unit]\\nAfter=m.service'; printf '[Service]\\nType=oneshot\\nExecStart=/bin/false\\n' > $S/m.service; mkdir $U.requires; ln -s ../m.service $U.requires/", "required-unit-failed"),
    Variant("dropin x <<<$'[Unit]\\nRequires=m.service\\nAfter=m.service'; printf '[Service]\\nType=oneshot\\nExecStart=/bin/false\\nSuccessExitStatus=1\\n' > $S/m.service", "healthy"),
    Variant("dropin x <<<$'[Unit]\\nRequires=m.service\\nAfter=m.service'; printf '[Service]\\nType=oneshot\\nExecStartPre=/bin/mkdir -p /srv/m\\nExecStart=/usr/bin/test -d /srv/m\\n' > $S/m.service", "healthy"),
    Variant("mkdir $R/data; echo '/dev/vdb /data ext4 nofail 0 2' >> $R/etc/fstab; dropin x <<<$'[Unit]\\nRequiresMountsFor=/data/agent'", "required-unit-failed"),
    Variant("mkdir -p $R/data/agent; echo '/dev/vdb /data ext4 nofail 0 2' >> $R/etc/fstab; dropin x <<<$'[Service]\\nWorkingDirectory=/data/agent'", "required-unit-failed"),
    Variant("mkdir $R/data; echo 'tmpfs /data tmpfs nofail 0 2' >> $R/etc/fstab; dropin x <<<$'[Unit]\\nRequiresMountsFor=/data/agent /database'", "healthy"),
    Variant("dropin x <<<$'[Unit]\\nAfter=m.service\\nWants=m.service'; printf '[Service]\\nType=oneshot\\nTimeoutStartSec=5\\nExecStart=/bin/sleep infinity\\n' > $S/m.service", "healthy"),
    Variant("dropin x <<<$'[Unit]\\nAfter=m.service\\nRequires=m.service'; printf '[Service]\\nType=oneshot\\nTimeoutStartSec=5\\nExecStart=/bin/sleep infinity\\n' > $S/m.service", "required-unit-failed"),
    Variant("dropin x <<<$'[Unit]\\nAfter=m.service\\nRequires=m.service'; printf '[Service]\\nType=oneshot\\n' > $S/m.service", "healthy"),
    Variant("dropin x <<<$'[Unit]\\nAfter=m.service\\nBindsTo=m.service'; printf '[Service]\\nType=oneshot\\n' > $S/m.service", "required-unit-failed"),
    // a timer (booted)
    Variant("rm $W/$SVC; printf '[Timer]\\nOnBootSec=5\\nUnit=vm-browser-agent.service\\n' > $S/a.timer; mkdir -p $S/timers.target.wants; ln -s ../a.timer $S/timers.target.wants/", "healthy"),
    Variant("rm $W/$SVC; printf '[Timer]\\nOnBootSec=1h\\nUnit=vm-browser-agent.service\\n' > $S/a.timer; mkdir -p $S/timers.target.wants; ln -s ../a.timer $S/timers.target.wants/", "unknown"),
    // what a command finds may be made by one before it (booted)
    Variant("sed -i 's#^ExecStart=#ExecStartPre=/bin/mkdir -p /var/lib/agent\\nExecStartPre=/usr/bin/test -d /var/lib/agent\\n&#' $U", "healthy"),
    Variant("sed -i 's#^ExecStart=#ExecStartPre=/bin/mkdir -p /var/lib/other\\nExecStartPre=/usr/bin/test -d /var/lib/agent\\n&#' $U", "pre-start-failed"),
];
