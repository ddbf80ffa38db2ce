//! Accounts of the recipe, written into the four files of `passwd(5)`, `group(5)` and `shadow(5)`.
use crate::{
    recipe::User,
    tree::{Kind, Node, Tree, TreeError},
};

/// Adds `users`, each with a group of its own, a locked password and a home that it owns.
pub(crate) fn add(tree: &mut Tree, users: &[User]) -> Result<(), TreeError> {
    for user in users {
        let User {
            name,
            uid,
            home,
            shell,
        } = user;
        tree.put(home, Node::new(Kind::Directory, 0o755))?;
        tree.own(home, *uid);
        append(
            tree,
            "/etc/passwd",
            &format!("{name}:x:{uid}:{uid}:{name}:{home}:{shell}\n"),
            0o644,
            0,
        )?;
        append(tree, "/etc/group", &format!("{name}:x:{uid}:\n"), 0o644, 0)?;
        append(
            tree,
            "/etc/shadow",
            &format!("{name}:!::::::::\n"),
            0o640,
            42,
        )?;
        append(tree, "/etc/gshadow", &format!("{name}:!::\n"), 0o640, 42)?;
    }
    Ok(())
}

/// `gid` 42 is Debian's `shadow` (base-passwd).
fn append(tree: &mut Tree, path: &str, line: &str, mode: u32, gid: u32) -> Result<(), TreeError> {
    let mut text = tree.read(path)?;
    text.extend_from_slice(line.as_bytes());
    let content = crate::tree::Content::Bytes(text.into());
    tree.put(
        path,
        Node {
            gid,
            ..Node::new(Kind::File(content), mode)
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_home_belongs_to_its_account() {
        let mut tree = Tree::default();
        for path in ["/etc/passwd", "/etc/group", "/etc/shadow", "/etc/gshadow"] {
            tree.put_file(path, "root:x:0:\n", 0o644).unwrap();
        }
        tree.put_file("/home/person/.config/x", "x", 0o644).unwrap();
        let user = User {
            name: "person".into(),
            uid: 1000,
            home: "/home/person".into(),
            shell: "/bin/bash".into(),
        };
        add(&mut tree, &[user]).unwrap();
        let passwd = String::from_utf8(tree.read("/etc/passwd").unwrap()).unwrap();
        assert!(
            passwd.ends_with("\nperson:x:1000:1000:person:/home/person:/bin/bash\n"),
            "{passwd}"
        );
        assert_eq!(tree.node("/home/person/.config/x").unwrap().uid, 1000);
        assert_eq!(tree.node("/etc/shadow").unwrap().gid, 42);
    }
}
