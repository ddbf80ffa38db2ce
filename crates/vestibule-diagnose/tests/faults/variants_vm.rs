//! Variants about the machine below its units: network, root device, mounts, PID 1, first boot. As those of `variants.rs`,
//! but each with the kernel command line that it is about.
use crate::variants::judge;
use anyhow::Result;

/// What happens to the tree, words added to the command line, and the cause that must be named; `healthy` for traps.
struct Variant(&'static str, &'static str, &'static str);

#[rustfmt::skip]
const VARIANTS: &[Variant] = &[
    // what networkd does not take
    Variant("chmod 600 $R/etc/systemd/network/10-eth.network", "", "network-matches-no-link"),
    Variant("chmod 640 $R/etc/systemd/network/10-eth.network; chown 0:systemd-network $R/etc/systemd/network/10-eth.network || chown 0:$(sed -n 's/^systemd-network:[^:]*:\\([0-9]*\\):.*/\\1/p' $R/etc/group) $R/etc/systemd/network/10-eth.network", "", "healthy"),
    Variant("chmod 700 $R/etc/systemd/network", "", "network-matches-no-link"),
    Variant("chmod 600 $R/etc/systemd/network/10-eth.network; mkdir -p $S/systemd-networkd.service.d; printf '[Service]\\nUser=root\\n' > $S/systemd-networkd.service.d/u.conf", "", "healthy"),
    Variant("mkdir $R/etc/systemd/network/10-eth.network.d; printf '[Network]\\nDNS=10.0.2.3\\n' > $R/etc/systemd/network/10-eth.network.d/a.conf; chmod 600 $R/etc/systemd/network/10-eth.network.d/a.conf", "", "network-matches-no-link"),
    Variant("mv $R/etc/systemd/network/10-eth.network $R/etc/systemd/network/10-eth.conf", "", "network-matches-no-link"),
    Variant("mv $R/etc/systemd/network/10-eth.network $R/usr/lib/systemd/network/; ln -s /dev/null $R/etc/systemd/network/10-eth.network", "", "network-matches-no-link"),
    Variant("ln -s /dev/null $R/etc/systemd/network/80-wifi-adhoc.network", "", "healthy"),
    Variant("rm $R/etc/systemd/network/10-eth.network", "", "waits-for-network-online"),
    Variant("rm $R/etc/systemd/network/10-eth.network; ln -s /dev/null $S/systemd-networkd.service", "", "healthy"),
    // which card a file is for
    Variant("sed -i 's/^Name=.*/&\\nVirtualization=container/' $R/etc/systemd/network/10-eth.network", "", "network-matches-no-link"),
    Variant("sed -i 's/^Name=.*/&\\nVirtualization=!container/' $R/etc/systemd/network/10-eth.network", "", "healthy"),
    Variant("sed -i 's/^Name=.*/&\\nHost=kiosk/' $R/etc/systemd/network/10-eth.network", "", "network-matches-no-link"),
    Variant("sed -i 's/^Name=.*/&\\nHost=Browser-*/' $R/etc/systemd/network/10-eth.network", "", "healthy"),
    Variant("sed -i 's/^Name=.*/&\\nHost=kiosk/' $R/etc/systemd/network/10-eth.network", "systemd.hostname=kiosk", "healthy"),
    Variant("sed -i 's/^Name=.*/&\\nKernelCommandLine=agent.net/' $R/etc/systemd/network/10-eth.network", "", "network-matches-no-link"),
    Variant("sed -i 's/^Name=.*/MACAddress=52:54:00:12:34:56/' $R/etc/systemd/network/10-eth.network", "", "healthy"),
    Variant("sed -i 's/^Name=.*/Type=!wlan/' $R/etc/systemd/network/10-eth.network", "", "healthy"),
    Variant("sed -i 's/^Name=.*/Name=!lo/' $R/etc/systemd/network/10-eth.network", "", "healthy"),
    Variant("sed -i 's/^Name=.*//' $R/etc/systemd/network/10-eth.network", "", "network-matches-no-link"),
    Variant("sed -i 's/^Name=.*/Name=ens3/' $R/etc/systemd/network/10-eth.network", "", "healthy"),
    Variant("sed -i 's/^Name=.*/Name=ens3/' $R/etc/systemd/network/10-eth.network", "pci=off", "network-matches-no-link"),
    Variant("sed -i 's/^Name=.*/Name=eth0/' $R/etc/systemd/network/10-eth.network", "pci=off", "healthy"),
    // .link files
    Variant("printf '[Match]\\nType=ether\\n[Link]\\nName=lan0\\n' > $R/etc/systemd/network/10-lan.link", "", "network-matches-no-link"),
    Variant("printf '[Match]\\nType=ether\\n[Link]\\nName=lan0\\n' > $R/etc/systemd/network/10-lan.link; sed -i 's/^Name=.*/Name=lan0/' $R/etc/systemd/network/10-eth.network", "", "healthy"),
    Variant("printf '[Match]\\nType=ether\\n[Link]\\nName=lan0\\nAlternativeName=eth7\\n' > $R/etc/systemd/network/10-lan.link; sed -i 's/^Name=.*/Name=eth7/' $R/etc/systemd/network/10-eth.network", "", "healthy"),
    Variant("printf '[Match]\\nMACAddress=52:54:00:00:00:01\\n[Link]\\nName=lan0\\n' > $R/etc/systemd/network/10-lan.link", "", "healthy"),
    Variant("printf '[Match]\\nType=wlan\\n[Link]\\nName=lan0\\n' > $R/etc/systemd/network/10-lan.link", "", "healthy"),
    // ip=
    Variant("rm $R/etc/systemd/network/10-eth.network", "ip=10.0.2.15::10.0.2.2:255.255.255.0::eth0:off", "healthy"),
    Variant("rm $R/etc/systemd/network/10-eth.network", "ip=10.0.2.15::10.0.2.2:255.255.255.0::eth1:off", "network-matches-no-link"),
    Variant("rm $R/etc/systemd/network/10-eth.network", "ip=dhcp", "waits-for-network-online"),
    Variant("rm $R/etc/systemd/network/10-eth.network; ln -s /dev/null $S/systemd-network-generator.service", "ip=10.0.2.15::10.0.2.2:255.255.255.0::eth0:off", "waits-for-network-online"),
    // the driver
    Variant("mkdir -p $R/usr/lib/modules/6.1.0/kernel/drivers/net; touch $R/usr/lib/modules/6.1.0/kernel/drivers/net/virtio_net.ko $R/usr/lib/modules/6.1.0/modules.builtin", "", "healthy"),
    Variant("mkdir -p $R/usr/lib/modules/6.1.0/kernel/drivers/net; touch $R/usr/lib/modules/6.1.0/kernel/drivers/net/virtio_net.ko $R/usr/lib/modules/6.1.0/modules.builtin; mkdir -p $R/etc/modprobe.d; echo 'blacklist virtio-net' > $R/etc/modprobe.d/x.conf", "", "network-driver-missing"),
    Variant("mkdir -p $R/usr/lib/modules/6.1.0/kernel/drivers/net; touch $R/usr/lib/modules/6.1.0/kernel/drivers/net/virtio_net.ko $R/usr/lib/modules/6.1.0/modules.builtin", "module_blacklist=floppy,virtio_net", "network-driver-missing"),
    Variant("mkdir -p $R/usr/lib/modules/6.1.0/kernel/drivers/net; echo kernel/drivers/net/virtio_net.ko > $R/usr/lib/modules/6.1.0/modules.builtin", "module_blacklist=virtio_net", "healthy"),
    Variant("mkdir -p $R/usr/lib/modules/6.1.0/kernel/fs/ext4; touch $R/usr/lib/modules/6.1.0/kernel/fs/ext4/ext4.ko $R/usr/lib/modules/6.1.0/modules.builtin", "", "network-driver-missing"),
    Variant("mkdir -p $R/usr/lib/modules/6.1.0; touch $R/usr/lib/modules/6.1.0/modules.builtin", "", "healthy"),
    // PID 1
    Variant("true", "init=/bin/bash", "default-target-wrong"),
    Variant("true", "init=/lib/systemd/systemd", "healthy"),
    Variant("true", "init=/bin/sh -- -c 'exec /sbin/init'", "healthy"),
    // first boot
    Variant("echo uninitialized > $R/etc/machine-id; rm -f $R/etc/localtime", "", "first-boot-prompt"),
    Variant("echo uninitialized > $R/etc/machine-id; rm -f $R/etc/localtime", "systemd.firstboot=off", "healthy"),
    Variant("echo uninitialized > $R/etc/machine-id; rm -f $R/etc/localtime", "systemd.firstboot", "first-boot-prompt"),
    Variant("echo uninitialized > $R/etc/machine-id; rm -f $R/etc/localtime", "systemd.condition-first-boot=0", "healthy"),
    Variant("rm -f $R/etc/localtime", "systemd.condition-first-boot=1", "first-boot-prompt"),
    // mounts
    Variant("echo '/dev/vdb /data ext4 defaults 0 2' >> $R/etc/fstab", "fstab=no", "healthy"),
    Variant("echo '/dev/vdb /data ext4 defaults 0 2' >> $R/etc/fstab; printf '[Service]\\nEnvironment=HOST=127.0.0.1\\n' | dropin x", "", "mount-device-missing"),
    Variant("printf '[Mount]\\nWhat=/dev/vdb\\nWhere=/data\\nType=ext4\\n' > $S/data.mount; mkdir -p $S/local-fs.target.requires; ln -s ../data.mount $S/local-fs.target.requires/", "", "mount-device-missing"),
    Variant("printf '[Mount]\\nWhat=/dev/vdb\\nWhere=/data\\nType=ext4\\n' > $S/data.mount; mkdir -p $S/local-fs.target.wants; ln -s ../data.mount $S/local-fs.target.wants/", "", "healthy"),
    Variant("printf '[Mount]\\nWhat=tmpfs\\nWhere=/data\\nType=tmpfs\\n' > $S/data.mount; mkdir -p $S/local-fs.target.requires; ln -s ../data.mount $S/local-fs.target.requires/", "", "healthy"),
    // a root that stays read-only
    Variant(": > $R/etc/fstab", "ro", "root-read-only"),
    Variant(": > $R/etc/fstab", "", "healthy"),
    Variant("true", "ro", "healthy"),
    Variant("ln -s /dev/null $S/systemd-remount-fs.service", "ro", "root-read-only"),
    Variant(": > $R/etc/fstab", "ro systemd.volatile=overlay", "healthy"),
];

#[test]
fn variants_of_the_machine_are_named() -> Result<()> {
    let Some((_, base)) = crate::faults("variants-vm")? else {
        return Ok(());
    };
    judge(&base, "", VARIANTS.iter().map(|v| (v.0, v.1, v.2)))
}
